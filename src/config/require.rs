//! What a role cannot do without, and what does not go together.

use super::{Config, Mistakes, PostgresTarget, Role, Secret};

const ORDERS_DATABASE: &str = "orders.database_url";
const PAYMENTS_DATABASE: &str = "payments.database_url";
const BROKER: &str = "kafka.bootstrap_servers";
const PROTOCOL: &str = "kafka.security_protocol";

impl Config {
    /// Checks that what `role` needs is configured. `load` has done so for the role it was asked to load for.
    ///
    /// # Errors
    ///
    /// Every setting that is missing or contradicts another one, by its key.
    pub fn require_for(&self, role: Role) -> Result<(), Mistakes> {
        let mut mistakes = Mistakes::default();
        for (key, problem) in missing(self, role, |_| false) {
            mistakes.add(key, problem);
        }
        mistakes.into_result()
    }
}

/// As [`Config::require_for`]; a key that is `excused` is wrong already and not said to be missing.
pub(super) fn missing(config: &Config, role: Role, excused: impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
    let mut missing: Vec<(&'static str, String)> = Vec::new();
    let (orders, payments) = (&config.orders.database_url, &config.payments.database_url);
    let without = |key: &str| match key {
        ORDERS_DATABASE => orders.is_none(),
        PAYMENTS_DATABASE => payments.is_none(),
        _ => config.kafka.bootstrap_servers.is_empty(),
    };
    let needed: &[&'static str] = match role {
        Role::Gateway | Role::All => &[],
        Role::Orders => &[ORDERS_DATABASE, BROKER],
        Role::Payments => &[PAYMENTS_DATABASE, BROKER],
        Role::Relay => &[ORDERS_DATABASE, PAYMENTS_DATABASE, BROKER],
        Role::Migrate | Role::Audit | Role::Dlq if config.data_dir_given => &[],
        Role::Migrate | Role::Audit | Role::Dlq => &[ORDERS_DATABASE, PAYMENTS_DATABASE],
    };
    for &key in needed {
        if without(key) && !excused(key) {
            missing.push((key, format!("is not configured, and {} needs it", role.as_str())));
        }
    }
    if role == Role::All {
        for (key, other) in [(ORDERS_DATABASE, PAYMENTS_DATABASE), (PAYMENTS_DATABASE, ORDERS_DATABASE)] {
            if without(key) && !without(other) && !excused(key) {
                missing
                    .push((key, format!("is not configured, but {other} is; configure both, or neither for a server of its own")));
            }
        }
        missing.extend(same_port(config, &excused));
    }
    let embedded =
        (role == Role::All && orders.is_none() && payments.is_none() && !excused(ORDERS_DATABASE) && !excused(PAYMENTS_DATABASE))
            || (matches!(role, Role::Migrate | Role::Audit | Role::Dlq) && config.data_dir_given);
    if embedded && config.data_dir.as_os_str().is_empty() && !excused("--data-dir") {
        missing.push(("--data-dir", "must be given: neither XDG_DATA_HOME nor HOME names an absolute path".into()));
    }
    // Under a protocol that could not be read nothing is known to be missing, either.
    let of_a_known_protocol = |key: &str| !key.starts_with("kafka.") || !excused(PROTOCOL);
    missing.extend(insecure(config, role).into_iter().filter(|(key, _)| !excused(key) && of_a_known_protocol(key)));
    if let (Some(orders), Some(payments)) = (orders, payments)
        && same_database(orders, payments)
    {
        missing.push((PAYMENTS_DATABASE, format!("names the same database as {ORDERS_DATABASE}; each service owns its own")));
    }
    missing
}

/// What of the connections that `role` makes cannot be secured as configured: files that cannot be used, settings that contradict each other.
fn insecure(config: &Config, role: Role) -> Vec<(&'static str, String)> {
    let (orders, payments, broker) = match role {
        Role::Gateway => return Vec::new(),
        Role::Migrate | Role::Audit | Role::Dlq if config.data_dir_given => return Vec::new(),
        Role::Orders => (true, false, true),
        Role::Payments => (false, true, true),
        Role::Relay | Role::All | Role::Migrate | Role::Audit | Role::Dlq => (true, true, true),
    };
    let mut found = Vec::new();
    for (key, url, is_used) in
        [(ORDERS_DATABASE, &config.orders.database_url, orders), (PAYMENTS_DATABASE, &config.payments.database_url, payments)]
    {
        let target = url.as_ref().filter(|_| is_used).and_then(|url| PostgresTarget::read(url.expose()).ok());
        if let Some(Err(problem)) = target.map(|target| target.client()) {
            found.push((key, problem.to_string()));
        }
    }
    if broker && !config.kafka.bootstrap_servers.is_empty() {
        found.extend(config.kafka.contradictions());
    }
    found
}

/// In one process no two roles can listen on the same port of the same address.
fn same_port(config: &Config, excused: &impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
    let listens = [
        ("gateway.listen", config.gateway.listen),
        ("orders.listen", config.orders.listen),
        ("payments.listen", config.payments.listen),
        ("relay.listen", config.relay.listen),
    ];
    let mut clashes = Vec::new();
    for (at, (key, address)) in listens.iter().enumerate() {
        let clash = listens[..at].iter().find(|(_, other)| {
            let overlap = address.ip() == other.ip() || address.ip().is_unspecified() || other.ip().is_unspecified();
            address.port() != 0 && address.port() == other.port() && overlap
        });
        if let Some((other, _)) = clash
            && !excused(key)
            && !excused(other)
        {
            clashes.push((*key, format!("{address} is taken by {other}")));
        }
    }
    clashes
}

/// Both hold tables of the same names (`outbox`, `consumer_offset`), so one database for both would mix them up.
fn same_database(a: &Secret, b: &Secret) -> bool {
    let read = |url: &Secret| PostgresTarget::read(url.expose()).ok().map(|target| target.config);
    match (read(a), read(b)) {
        (Some(a), Some(b)) => {
            let ports = |config: &tokio_postgres::Config| match config.get_ports() {
                [] => vec![5432],
                ports => ports.to_vec(),
            };
            a.get_hosts() == b.get_hosts() && ports(&a) == ports(&b) && a.get_dbname() == b.get_dbname()
        }
        _ => false,
    }
}
