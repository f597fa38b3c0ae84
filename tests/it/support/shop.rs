//! The real binary, as a user starts it: its processes, their addresses, and a client.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long anything of a test may take to come about.
pub const PATIENCE: Duration = Duration::from_secs(45);

/// When the server ends the transaction of a process that says nothing.
pub const IDLE_IN_TRANSACTION: &str = "SHOPD__DATABASE__IDLE_IN_TRANSACTION_TIMEOUT_MS";
/// For tests that freeze processes: the default, by which nobody waits for one of them.
pub const ENDS_WHO_IS_FROZEN: [(&str, &str); 1] = [(IDLE_IN_TRANSACTION, "2000")];

/// One running process of `shopd`; killed when dropped.
pub struct Process {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    reader: std::thread::JoinHandle<()>,
}

impl Process {
    /// Starts `shopd ROLE` with every port picked by the system, logging JSON.
    pub fn start(args: &[&str], env: &[(String, String)]) -> Self {
        Self::start_program(env!("CARGO_BIN_EXE_shopd"), args, env)
    }

    /// The same of another build.
    pub fn start_program(program: &str, args: &[&str], env: &[(String, String)]) -> Self {
        let mut command = Command::new(program);
        command.args(args).args(["--log", "json"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        for role in ["GATEWAY", "ORDERS", "PAYMENTS", "RELAY"] {
            command.env(format!("SHOPD__{role}__LISTEN"), "127.0.0.1:0");
        }
        // A stall of a busy machine is no frozen process; the tests of those set what they need.
        command.env(IDLE_IN_TRANSACTION, "30000");
        command.envs(env.iter().map(|(name, value)| (name, value)));
        let mut child = command.spawn().expect("shopd starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, into) = (BufReader::new(child.stderr.take().expect("a pipe")), log.clone());
        let reader = std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                into.lock().unwrap().push(line);
            }
        });
        Self { child, log, reader }
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("a process of ours");
    }

    /// SIGSTOP, and waits until every thread of it stands still: what is sent from then on meets a frozen process.
    pub async fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.pid());
        let stands = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        let since = Instant::now();
        while !std::fs::read_dir(&tasks).expect("a process").flatten().all(stands) {
            assert!(since.elapsed() < PATIENCE, "it does not stand still");
            poll().await;
        }
    }

    /// Everything it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// The address that `role` says it listens on.
    pub async fn address(&self, role: &str) -> String {
        let find = || {
            self.log.lock().unwrap().iter().find_map(|line| {
                let entry: Value = serde_json::from_str(line).ok()?;
                let field = |name: &str| entry.get(name).or_else(|| entry.get("fields")?.get(name)).and_then(Value::as_str);
                (field("message") == Some("listening") && field("role") == Some(role))
                    .then(|| field("address").map(String::from))?
            })
        };
        let since = Instant::now();
        while since.elapsed() < PATIENCE {
            if let Some(address) = find() {
                return format!("http://{address}");
            }
            poll().await;
        }
        panic!("{role} does not listen:\n{}", self.log());
    }

    /// Waits for its end, and a little for the rest of what it said: a server that outlives it may have its standard error, too. The exit
    /// status.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        const READ_WITHIN: Duration = Duration::from_secs(2);
        let since = Instant::now();
        while since.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().expect("a child") {
                let ended = Instant::now();
                while !self.reader.is_finished() && ended.elapsed() < READ_WITHIN {
                    poll().await;
                }
                return status;
            }
            poll().await;
        }
        panic!("it does not end:\n{}", self.log());
    }

    /// SIGKILL, and waits.
    pub async fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One step of a bounded wait.
pub async fn poll() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

/// `shopd all` on its embedded default.
pub struct All {
    pub process: Process,
    pub client: Client,
    pub orders: String,
    pub payments: String,
    pub dir: PathBuf,
}

impl All {
    pub async fn start(dir: PathBuf) -> Self {
        Self::start_with(dir, &[]).await
    }

    /// With further variables.
    pub async fn start_with(dir: PathBuf, extra: &[(&str, &str)]) -> Self {
        let extra: Vec<(String, String)> = extra.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let process = Process::start(&["all", "--data-dir", dir.to_str().expect("a path")], &extra);
        let client = Client::new(process.address("gateway").await);
        let (orders, payments) = (process.address("orders").await, process.address("payments").await);
        client.ready().await;
        Self { process, client, orders, payments, dir }
    }
}

/// Four processes on somebody's Kafka and databases.
pub struct Four {
    pub gateway: Process,
    pub orders: Process,
    pub payments: Process,
    pub relay: Process,
    pub client: Client,
    pub env: Vec<(String, String)>,
}

/// What all roles are told.
pub fn environment(kafka: &str, orders_db: &str, payments_db: &str, prefix: &str) -> Vec<(String, String)> {
    [
        ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", kafka),
        ("SHOPD__KAFKA__TOPIC_PREFIX", prefix),
        ("SHOPD__KAFKA__PARTITIONS", "4"),
        ("SHOPD__ORDERS__DATABASE_URL", orders_db),
        ("SHOPD__PAYMENTS__DATABASE_URL", payments_db),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

/// Both databases, and the topics.
pub async fn migrate(env: &[(String, String)]) {
    let mut migrate = Process::start(&["migrate"], env);
    assert!(migrate.ended().await.success(), "{}", migrate.log());
}

impl Four {
    /// Migrates, then starts the roles one after the other.
    pub async fn start(kafka: &str, orders_db: &str, payments_db: &str, prefix: &str) -> Self {
        Self::start_with::<&str, &str>(kafka, orders_db, payments_db, prefix, &[]).await
    }

    /// With further variables.
    pub async fn start_with<N: AsRef<str>, V: AsRef<str>>(
        kafka: &str,
        orders_db: &str,
        payments_db: &str,
        prefix: &str,
        extra: &[(N, V)],
    ) -> Self {
        let mut env = environment(kafka, orders_db, payments_db, prefix);
        env.extend(extra.iter().map(|(name, value)| (name.as_ref().to_owned(), value.as_ref().to_owned())));
        migrate(&env).await;
        Self::on_migrated(env).await
    }

    /// The roles one after the other, over databases that are migrated already.
    pub async fn on_migrated(env: Vec<(String, String)>) -> Self {
        Self::on_migrated_each(env, |_| Vec::new()).await
    }

    /// With further variables of each role's own.
    pub async fn on_migrated_each(mut env: Vec<(String, String)>, own: impl Fn(&str) -> Vec<(String, String)>) -> Self {
        let start = |role: &str| Process::start(&[role], &[env.clone(), own(role)].concat());
        let [orders, payments, relay] = ["orders", "payments", "relay"].map(start);
        env.push(("SHOPD__GATEWAY__ORDERS_URLS".into(), orders.address("orders").await));
        env.push(("SHOPD__GATEWAY__PAYMENTS_URLS".into(), payments.address("payments").await));
        let gateway = Process::start(&["gateway"], &env);
        let client = Client::new(gateway.address("gateway").await);
        client.ready().await;
        for (process, role) in [(&orders, "orders"), (&payments, "payments"), (&relay, "relay")] {
            Client::new(process.address(role).await).ready().await;
        }
        Self { gateway, orders, payments, relay, client, env }
    }
}

impl Four {
    /// SIGKILL, then the same role again at the same address, where the others look for it.
    pub async fn crash(&mut self, role: &'static str) {
        let process = match role {
            "orders" => &mut self.orders,
            "payments" => &mut self.payments,
            "relay" => &mut self.relay,
            _ => &mut self.gateway,
        };
        let address = process.address(role).await;
        process.kill().await;
        let mut env = self.env.clone();
        let listen = address.trim_start_matches("http://").to_owned();
        env.push((format!("SHOPD__{}__LISTEN", role.to_uppercase()), listen));
        *process = Process::start(&[role], &env);
    }

    /// The prefix of its topics.
    pub fn prefix(&self) -> &str {
        self.env.iter().find(|(name, _)| name == "SHOPD__KAFKA__TOPIC_PREFIX").map_or("", |(_, prefix)| prefix)
    }
}

/// An answer, whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }

    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }
}

/// A client of one port.
#[derive(Clone)]
pub struct Client {
    pub base: String,
    http: reqwest::Client,
}

impl Client {
    pub fn new(base: String) -> Self {
        Self::waiting(base, Duration::from_secs(15))
    }

    /// One that waits so long for an answer.
    pub fn waiting(base: String, timeout: Duration) -> Self {
        // The tree holds more than one TLS implementation; the client asks for one though it speaks plain HTTP.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().timeout(timeout).redirect(reqwest::redirect::Policy::none());
        Self { base, http: http.build().expect("a client") }
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&str>,
    ) -> Result<Answer, reqwest::Error> {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
                request = request.header("Content-Type", "application/json");
            }
            request = request.body(body.to_owned());
        }
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let headers = answer.headers().iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap_or_default().to_owned())).collect();
        Ok(Answer { status, headers, text: answer.text().await? })
    }

    /// An answer that does not end, until `text` came in it.
    pub async fn beginning(&self, path: &str, text: &str) -> Answer {
        let mut answer = self.http.get(format!("{}{path}", self.base)).send().await.expect("an answer");
        let status = answer.status().as_u16();
        let headers = answer.headers().iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap_or_default().to_owned())).collect();
        let mut came = String::new();
        while !came.contains(text) {
            let chunk = answer.chunk().await.expect("more").unwrap_or_else(|| panic!("it ended: {came}"));
            came.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
        }
        Answer { status, headers, text: came }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], None).await.expect("an answer")
    }

    pub async fn post(&self, path: &str, body: &str) -> Answer {
        self.send("POST", path, &[], Some(body)).await.expect("an answer")
    }

    /// Waits until the role answers ready.
    pub async fn ready(&self) {
        let since = Instant::now();
        let mut last = String::new();
        while since.elapsed() < PATIENCE {
            match self.send("GET", "/health/ready", &[], None).await {
                Ok(answer) if answer.status == 200 => return,
                other => last = format!("{other:?}"),
            }
            poll().await;
        }
        panic!("{} is not ready: {last}", self.base);
    }

    /// Opens an account with `amount` in it.
    pub async fn account(&self, user: &str, amount: &str) {
        self.send("POST", &format!("/api/PaymentsProxy/{user}"), &[], None).await.expect("an answer").expect(200);
        if amount != "0" {
            self.post(&format!("/api/PaymentsProxy/{user}/deposit"), amount).await.expect(200);
        }
    }

    pub async fn balance(&self, user: &str) -> String {
        let answer = self.get(&format!("/api/PaymentsProxy/{user}/balance")).await.expect(200);
        raw_member(&answer.text, "balance")
    }

    /// Waits until the order has ended.
    pub async fn ended(&self, id: &str) -> Value {
        let since = Instant::now();
        let mut last = Value::Null;
        while since.elapsed() < PATIENCE {
            if let Ok(answer) = self.send("GET", &format!("/api/OrdersProxy/{id}"), &[], None).await
                && answer.status == 200
            {
                last = answer.json();
                if last["status"] == "Finished" || last["status"] == "Cancelled" {
                    return last;
                }
            }
            poll().await;
        }
        panic!("order {id} does not end: {last}");
    }
}

/// A member's text as it stands on the wire.
pub fn raw_member(json: &str, name: &str) -> String {
    let members: HashMap<String, Box<serde_json::value::RawValue>> = serde_json::from_str(json).expect("an object");
    members[name].get().to_owned()
}
