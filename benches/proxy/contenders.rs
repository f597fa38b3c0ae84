//! The proxies, each configured as a careful operator would for the work that the gateway does: the same number of workers, kept
//! connections on both sides, the route's prefix rewritten, the forwarding headers and a request id written, nothing logged.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::load::Load;
use super::{CONNECTIONS, Result, WORKERS, machine};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy)]
pub enum Contender {
    Shopd,
    Nginx,
    Haproxy,
}

/// A proxy that runs; it ends when this is dropped.
pub struct Started {
    pub name: &'static str,
    pub address: String,
    version: String,
    child: Child,
}

impl Contender {
    pub const ALL: [Self; 3] = [Self::Shopd, Self::Nginx, Self::Haproxy];

    pub fn name(self) -> &'static str {
        match self {
            Self::Shopd => "shopd",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
        }
    }

    /// `None` where it is not installed.
    pub fn start(self, dir: &Path, upstream: SocketAddr, load: &Load) -> Result<Option<Started>> {
        let version = match self.version()? {
            Some(version) => version,
            None => return Ok(None),
        };
        let (child, address) = match self {
            Self::Shopd => shopd(upstream)?,
            Self::Nginx => {
                let address = free_address()?;
                let config = dir.join("nginx.conf");
                std::fs::write(&config, nginx(dir, address, upstream))?;
                let mut command = Command::new("nginx");
                command.arg("-p").arg(dir).arg("-c").arg(&config);
                (quiet(command)?, address.to_string())
            }
            Self::Haproxy => {
                let address = free_address()?;
                let config = dir.join("haproxy.cfg");
                std::fs::write(&config, haproxy(address, upstream))?;
                let mut command = Command::new("haproxy");
                command.args(["-db", "-q", "-f"]).arg(&config);
                (quiet(command)?, address.to_string())
            }
        };
        let mut started = Started { name: self.name(), address, version, child };
        started.listens(load)?;
        Ok(Some(started))
    }

    fn version(self) -> Result<Option<String>> {
        let mut command = match self {
            Self::Shopd => return Ok(Some(env!("CARGO_PKG_VERSION").to_owned())),
            Self::Nginx => Command::new("nginx"),
            Self::Haproxy => Command::new("haproxy"),
        };
        match command.arg("-v").output() {
            Ok(output) => {
                let text = [output.stdout, output.stderr].concat();
                let text = String::from_utf8_lossy(&text).into_owned();
                let mut words = text.split([' ', '/', '\n']);
                let version = words.find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'));
                Ok(Some(version.unwrap_or("of unknown version").to_owned()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Started {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn version(&self) -> (&'static str, String) {
        (self.name, self.version.clone())
    }

    /// Of all its processes; what they share counts once each.
    pub fn resident_bytes(&self) -> u64 {
        machine::tree(self.pid()).into_iter().map(machine::resident).sum()
    }

    fn listens(&mut self, load: &Load) -> Result<()> {
        let since = Instant::now();
        while TcpStream::connect(&self.address).is_err() {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("{} ended: {status}", self.name).into());
            }
            if since.elapsed() > PATIENCE {
                return Err(format!("{} does not listen on {}", self.name, self.address).into());
            }
            load.pause(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // By SIGTERM, so that a master takes its workers with it.
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn quiet(mut command: Command) -> Result<Child> {
    Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?)
}

/// One that nobody has now; whoever takes it before its proxy does makes that proxy fail by name.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn shopd(upstream: SocketAddr) -> Result<(Child, String)> {
    let mut command = Command::new(machine::program());
    command.args(["gateway", "--log", "json"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.env("SHOPD__GATEWAY__LISTEN", "127.0.0.1:0").env("SHOPD__HTTP__WORKERS", WORKERS.to_string());
    for service in ["ORDERS", "PAYMENTS"] {
        command.env(format!("SHOPD__GATEWAY__{service}_URLS"), format!("http://{upstream}"));
    }
    let mut child = command.spawn()?;
    let mut lines = BufReader::new(child.stderr.take().ok_or("no pipe")?).lines();
    let mut said = Vec::new();
    while let Some(Ok(line)) = lines.next() {
        let entry: Value = serde_json::from_str(&line).unwrap_or_default();
        if entry["message"] == "listening" {
            let address = entry["address"].as_str().unwrap_or_default().to_owned();
            // The pipe must not fill up.
            std::thread::spawn(move || lines.for_each(drop));
            return Ok((child, address));
        }
        said.push(line);
    }
    Err(format!("shopd does not listen: {}", said.join("\n")).into())
}

fn nginx(dir: &Path, address: SocketAddr, upstream: SocketAddr) -> String {
    let dir = dir.display();
    format!(
        "daemon off;
worker_processes {WORKERS};
pid {dir}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    server_tokens off;
    keepalive_timeout 75s;
    keepalive_requests 100000000;
    client_body_temp_path {dir}/nginx-body;
    proxy_temp_path {dir}/nginx-proxy;
    fastcgi_temp_path {dir}/nginx-fastcgi;
    uwsgi_temp_path {dir}/nginx-uwsgi;
    scgi_temp_path {dir}/nginx-scgi;
    client_max_body_size 64k;
    client_body_buffer_size 64k;
    map $http_x_request_id $id {{ default $http_x_request_id; '' $request_id; }}
    upstream orders {{
        server {upstream};
        keepalive {CONNECTIONS};
        keepalive_requests 100000000;
    }}
    server {{
        listen {address} backlog=1024;
        location /api/OrdersProxy {{
            proxy_pass http://orders/api/Orders;
            proxy_http_version 1.1;
            proxy_connect_timeout 3s;
            proxy_read_timeout 10s;
            proxy_set_header Connection '';
            proxy_set_header Host $http_host;
            proxy_set_header X-Request-Id $id;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header Via '1.1 nginx';
            add_header X-Request-Id $id always;
            add_header Via '1.1 nginx' always;
        }}
    }}
}}
"
    )
}

fn haproxy(address: SocketAddr, upstream: SocketAddr) -> String {
    format!(
        "global
    nbthread {WORKERS}
    maxconn 4096
defaults
    mode http
    timeout connect 3s
    timeout client 75s
    timeout server 10s
    timeout http-request 10s
    timeout http-keep-alive 75s
    option forwardfor
    http-reuse always
frontend gateway
    bind {address} backlog 1024
    http-request set-var(txn.id) req.hdr(x-request-id)
    http-request set-var(txn.id) uuid unless {{ var(txn.id) -m found }}
    http-request set-header X-Request-Id %[var(txn.id)]
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    http-request set-header X-Forwarded-Proto http
    http-request add-header Via '1.1 haproxy'
    http-request replace-path /api/OrdersProxy(.*) /api/Orders\\1
    http-response set-header X-Request-Id %[var(txn.id)]
    http-response add-header Via '1.1 haproxy'
    default_backend orders
backend orders
    server one {upstream} maxconn 4096 pool-max-conn {CONNECTIONS}
"
    )
}
