//! Servers that are spoken to over TLS, with passwords: their certificates, a Postgres that lets nobody in without, a broker with a
//! listener of each kind. One of each for the whole test process.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use shopd::config::{KafkaConfig, SaslMechanism, Secret, SecurityProtocol};
use shopd::embedded;
use tokio::sync::OnceCell;

use super::kafka::{self, Broker};
use super::postgres;
use super::shop::{PATIENCE, poll};

/// Of the user `shop`, at both servers.
pub const PASSWORD: &str = "correct horse";

/// The only name that the servers' certificates are for.
pub const NAME: &str = "localhost";

/// The broker's sessions over SASL_PLAINTEXT end after this.
pub const SESSION: Duration = Duration::from_millis(1_200);

/// PEM files that certificates and keys of this test process lie in.
pub struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).expect("a file")
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("a file");
    }
}

/// `ca.pem`, whose authority signed `server.pem` and `client.pem`, each with its `….key`; and `other.pem` of another authority.
pub fn files() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let files = Files { dir: tempfile::tempdir().expect("a directory") };
        let authority = authority(&files, "ca.pem", "an authority");
        authority_signs(&files, &authority, "server", NAME, vec![NAME.to_owned()]);
        // Postgres takes the name of a certificate for that of its user.
        authority_signs(&files, &authority, "client", "certified", Vec::new());
        super::secure::authority(&files, "other.pem", "another authority");
        files
    })
}

fn authority(files: &Files, name: &str, common_name: &str) -> Issuer<'static, KeyPair> {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    files.write(name, &params.self_signed(&key).expect("a certificate").pem());
    Issuer::new(params, key)
}

fn authority_signs(files: &Files, authority: &Issuer<'static, KeyPair>, name: &str, common_name: &str, names: Vec<String>) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(names).expect("names");
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.use_authority_key_identifier_extension = true;
    files.write(&format!("{name}.pem"), &params.signed_by(&key, authority).expect("a certificate").pem());
    files.write(&format!("{name}.key"), &key.serialize_pem());
}

/// A Postgres that lets `shop` in by its password and `certified` by its certificate, both over TLS only.
pub struct Database {
    /// Of this machine's loopback.
    pub port: u16,
}

/// Databases of it, empty at first.
pub const DATABASES: [&str; 2] = ["secure_orders", "secure_payments"];
/// Further ones, for roles that should not come between those which use the first.
pub const OTHER_DATABASES: [&str; 2] = ["other_orders", "other_payments"];

impl Database {
    pub async fn shared() -> &'static Self {
        static DATABASE: OnceCell<Database> = OnceCell::const_new();
        DATABASE.get_or_init(Self::start).await
    }

    /// As `shop` with its password, under the name of the certificate, with more in the URL.
    pub fn url(&self, database: &str, parameters: &str) -> String {
        self.url_of(&format!("shop:{}@{NAME}", PASSWORD.replace(' ', "%20")), database, parameters)
    }

    pub fn url_of(&self, user_and_host: &str, database: &str, parameters: &str) -> String {
        format!("postgres://{user_and_host}:{}/{database}?{parameters}", self.port)
    }

    /// Made by the embedded server, which has only a socket; then run without it, at a port.
    async fn start() -> Self {
        let dir = postgres::own_dir();
        let made = embedded::start(&postgres::options(&dir)).await.expect("a database server");
        let (client, connection) =
            tokio_postgres::connect(made.url("postgres").expose(), tokio_postgres::NoTls).await.expect("a connection");
        tokio::spawn(connection);
        let mut statements = vec![
            format!("set password_encryption = 'scram-sha-256'; create role shop login password '{PASSWORD}'"),
            "create role certified login".to_owned(),
        ];
        let databases = DATABASES.iter().chain(&OTHER_DATABASES);
        statements.extend(databases.map(|name| format!("create database {name} owner shop")));
        for statement in statements {
            client.batch_execute(&statement).await.expect("done");
        }
        drop(client);
        made.stop(Duration::from_secs(20)).await.expect("a clean stop");

        let pgdata = dir.join("postgres");
        let owner = std::fs::metadata(&pgdata).expect("a database");
        let lay = |name: &str, text: &str| {
            let path = pgdata.join(name);
            std::fs::write(&path, text).expect("a file");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("closed to others");
            chown(&path, Some(owner.uid()), Some(owner.gid())).expect("the server's own");
        };
        for (name, file) in [("server.crt", "server.pem"), ("server.key", "server.key"), ("root.crt", "ca.pem")] {
            lay(name, &files().text(file));
        }
        lay("pg_hba.conf", "hostssl all certified samehost cert\nhostssl all shop samehost scram-sha-256\n");
        let [port] = free_ports();
        // The first word is the program, whichever was found.
        let last = std::fs::read_to_string(pgdata.join("postmaster.opts")).expect("how it was started");
        let mut command = Command::new(last.split(' ').next().expect("a program"));
        command.arg("-D").arg(&pgdata).args(["-k", "", "-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1"]);
        for setting in ["ssl=on", "ssl_ca_file=root.crt", "fsync=off", "max_connections=100"] {
            command.args(["-c", setting]);
        }
        let log = std::fs::File::create(dir.join("secure.log")).expect("a log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0).current_dir("/");
        if nix::unistd::geteuid().is_root() {
            command.uid(owner.uid()).gid(owner.gid());
        }
        // Stopped by whoever watches the directory.
        drop(command.spawn().expect("a database server"));
        let said = || std::fs::read_to_string(dir.join("secure.log")).unwrap_or_default();
        let since = std::time::Instant::now();
        while !said().contains("ready to accept connections") {
            assert!(since.elapsed() < PATIENCE && !said().contains("FATAL"), "the database server is not there:\n{}", said());
            poll().await;
        }
        Self { port }
    }
}

/// A broker with a listener of each kind, which lets `shop` in with its password.
pub struct SecureBroker {
    broker: Broker,
    ssl: u16,
    sasl_ssl: u16,
    sasl_plaintext: u16,
}

impl SecureBroker {
    pub async fn shared() -> &'static Self {
        static BROKER: OnceCell<SecureBroker> = OnceCell::const_new();
        BROKER.get_or_init(Self::start).await
    }

    /// `host:port` of a protocol's listener.
    pub fn bootstrap(&self, protocol: SecurityProtocol) -> String {
        match protocol {
            SecurityProtocol::Plaintext => self.broker.bootstrap.clone(),
            SecurityProtocol::Ssl => format!("{NAME}:{}", self.ssl),
            SecurityProtocol::SaslPlaintext => format!("{NAME}:{}", self.sasl_plaintext),
            SecurityProtocol::SaslSsl => format!("{NAME}:{}", self.sasl_ssl),
        }
    }

    /// Everything that this protocol needs, with a topic prefix of its own.
    pub fn config(&self, protocol: SecurityProtocol, mechanism: SaslMechanism) -> KafkaConfig {
        KafkaConfig {
            security_protocol: protocol,
            ssl_ca_file: protocol.has_tls().then(|| files().path("ca.pem")),
            sasl_mechanism: mechanism,
            sasl_username: protocol.has_sasl().then(|| "shop".to_owned()),
            sasl_password: protocol.has_sasl().then(|| Secret::new(PASSWORD)),
            ..kafka::config(&self.bootstrap(protocol))
        }
    }

    async fn start() -> Self {
        let [ssl, sasl_ssl, sasl_plaintext] = free_ports();
        let broker = Broker::prepared(|dir| prepare(dir, [ssl, sasl_ssl, sasl_plaintext])).await;
        Self { broker, ssl, sasl_ssl, sasl_plaintext }
    }
}

/// The variables for a broker that is reached like this.
pub fn variables(kafka: &KafkaConfig) -> Vec<(String, String)> {
    let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    [
        ("BOOTSTRAP_SERVERS", kafka.bootstrap_servers.join(",")),
        ("SECURITY_PROTOCOL", kafka.security_protocol.as_str().to_owned()),
        ("SSL_CA_FILE", text(&kafka.ssl_ca_file)),
        ("SASL_MECHANISM", kafka.sasl_mechanism.as_str().to_owned()),
        ("SASL_USERNAME", kafka.sasl_username.clone().unwrap_or_default()),
        ("SASL_PASSWORD", kafka.sasl_password.as_ref().map(|password| password.expose().to_owned()).unwrap_or_default()),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(name, value)| (format!("SHOPD__KAFKA__{name}"), value))
    .collect()
}

fn prepare(dir: &Path, [ssl, sasl_ssl, sasl_plaintext]: [u16; 3]) {
    let server = format!("{}{}", files().text("server.key"), files().text("server.pem"));
    std::fs::write(dir.join("server.pem"), server).expect("a file");
    std::fs::write(dir.join("ca.pem"), files().text("ca.pem")).expect("a file");
    let scram = ["SCRAM-SHA-256", "SCRAM-SHA-512"].map(|mechanism| format!("{mechanism}=[name=shop,password={PASSWORD}]\n"));
    std::fs::write(dir.join("scram"), scram.concat()).expect("a file");
    let session_ms = SESSION.as_millis();
    let mut extra = format!(
        "listeners=PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER@,SSL://127.0.0.1:{ssl},\
         SASL_SSL://127.0.0.1:{sasl_ssl},SASL_PLAINTEXT://127.0.0.1:{sasl_plaintext}\n\
         advertised.listeners=PLAINTEXT://127.0.0.1:@PORT@,SSL://{NAME}:{ssl},SASL_SSL://{NAME}:{sasl_ssl},\
         SASL_PLAINTEXT://{NAME}:{sasl_plaintext}\n\
         listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL,\
         SASL_PLAINTEXT:SASL_PLAINTEXT\n\
         ssl.keystore.type=PEM\nssl.keystore.location=@DIR@/server.pem\n\
         ssl.truststore.type=PEM\nssl.truststore.location=@DIR@/ca.pem\n\
         listener.name.ssl.ssl.client.auth=required\n\
         listener.name.sasl_ssl.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512\n\
         listener.name.sasl_plaintext.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256\n\
         listener.name.sasl_plaintext.plain.connections.max.reauth.ms={session_ms}\n\
         listener.name.sasl_plaintext.scram-sha-256.connections.max.reauth.ms={session_ms}\n"
    );
    let modules = "org.apache.kafka.common.security";
    let plain = format!("{modules}.plain.PlainLoginModule required user_shop=\"{PASSWORD}\"");
    for (listener, mechanism, module) in [
        ("sasl_ssl", "plain", plain.clone()),
        ("sasl_plaintext", "plain", plain),
        ("sasl_ssl", "scram-sha-512", format!("{modules}.scram.ScramLoginModule required")),
        ("sasl_plaintext", "scram-sha-256", format!("{modules}.scram.ScramLoginModule required")),
    ] {
        extra.push_str(&format!("listener.name.{listener}.{mechanism}.sasl.jaas.config={module};\n"));
    }
    extra.push_str(kafka::UNHURRIED);
    std::fs::write(dir.join("extra.properties"), extra).expect("a file");
}

/// Below the range that the system hands out, and beside those of the brokers' own.
pub(super) fn free_ports<const COUNT: usize>() -> [u16; COUNT] {
    let random = || std::iter::repeat_with(|| fastrand::u16(28_100..30_000)).take(100);
    let free = |port| std::net::TcpListener::bind(("127.0.0.1", port)).ok().map(|held| (port, held));
    // Each is held until all are found: no two are the same.
    let found: [_; COUNT] = std::array::from_fn(|_| random().find_map(free).expect("a free port"));
    found.map(|(port, _)| port)
}
