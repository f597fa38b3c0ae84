//! `/health/live` and `/health/ready`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::http::Method;
use actix_web::{HttpResponse, web};
use futures::future::BoxFuture;
use serde::Serialize;

use super::render::only;

/// No check may take longer; the checks themselves are bounded to two seconds.
const CHECK_TIME_MAX: Duration = Duration::from_millis(2_500);
/// How long an answer serves the next probes, so that they cannot load what they ask after.
const FRESH: Duration = Duration::from_millis(200);

/// Whether a role can do its work, and what does not answer (which need not hinder it).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    pub ready: bool,
    pub missing: Vec<String>,
}

/// Ready when nothing is missing.
impl From<Vec<String>> for Health {
    fn from(missing: Vec<String>) -> Self {
        Self { ready: missing.is_empty(), missing }
    }
}

type Check = Box<dyn Fn() -> BoxFuture<'static, Health> + Send + Sync>;

/// A role's own check; cheap to clone.
#[derive(Clone)]
pub struct Readiness(Arc<Inner>);

struct Inner {
    check: Check,
    /// Held during a check, so that probes that come meanwhile wait for its answer.
    last: tokio::sync::Mutex<Option<(Instant, Health)>>,
}

impl Readiness {
    /// `check` says what is missing (`Vec<String>`) or the whole [`Health`]; it should take two seconds at most.
    pub fn new<F, Fut, H>(check: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = H> + Send + 'static,
        H: Into<Health>,
    {
        let check: Check = Box::new(move || {
            let asked = check();
            Box::pin(async move { asked.await.into() })
        });
        Self(Arc::new(Inner { check, last: tokio::sync::Mutex::new(None) }))
    }

    /// The last answer while it is fresh, else a new one. Bounded.
    pub async fn health(&self) -> Health {
        let mut last = self.0.last.lock().await;
        if let Some((at, health)) = &*last
            && at.elapsed() < FRESH
        {
            return health.clone();
        }
        let late = || Health::from(vec!["an answer in time".to_owned()]);
        let health = tokio::time::timeout(CHECK_TIME_MAX, (self.0.check)()).await.unwrap_or_else(|_| late());
        *last = Some((Instant::now(), health.clone()));
        health
    }
}

#[derive(Serialize)]
struct Body<'a> {
    status: &'static str,
    role: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<&'a [String]>,
}

pub(super) fn configure(role: &'static str, readiness: Readiness) -> impl FnOnce(&mut web::ServiceConfig) {
    let live = move || async move { HttpResponse::Ok().json(Body { status: "live", role, missing: None }) };
    let ready = move || {
        let readiness = readiness.clone();
        async move {
            let health = readiness.health().await;
            let (mut answer, status) = match health.ready {
                true => (HttpResponse::Ok(), "ready"),
                false => (HttpResponse::ServiceUnavailable(), "unavailable"),
            };
            answer.json(Body { status, role, missing: Some(&health.missing) })
        }
    };
    move |config| {
        let get = |path| web::resource(path).default_service(only(&[Method::GET]));
        config.service(get("/health/live").route(web::get().to(live)));
        config.service(get("/health/ready").route(web::get().to(ready)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn probes_that_come_together_cost_one_check() {
        let checks = Arc::new(AtomicUsize::new(0));
        let counted = checks.clone();
        let readiness = Readiness::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            async { vec!["database".to_owned()] }
        });
        for health in futures::future::join_all((0..20).map(|_| readiness.health())).await {
            assert_eq!(health, Health { ready: false, missing: vec!["database".into()] });
        }
        assert_eq!(checks.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_check_that_hangs_is_an_answer_too() {
        let readiness = Readiness::new(|| std::future::pending::<Vec<String>>());
        assert!(!readiness.health().await.ready);
    }
}
