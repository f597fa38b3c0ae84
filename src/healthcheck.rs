//! `shopd healthcheck`: asks a role on this machine whether it is ready, for containers that have no curl. May import cli and config.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::cli::CheckedRole;
use crate::config::Config;

/// Bound on one whole check.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Of an answer no more is read; the status is in its first line and the names of what is away soon after.
const ANSWER_BYTES_MAX: u64 = 16 * 1024;

/// Exit 0 when every role asked answers 200, 1 when not, 2 when its port cannot be known. One line a role: standard output when ready,
/// else standard error.
pub fn run(config: &Config, role: CheckedRole) -> ExitCode {
    let mut code = 0;
    for (name, listen) in asked(config, role) {
        if listen.port() == 0 {
            say(&mut std::io::stderr(), format_args!("shopd: {name}.listen: has port 0, so a health check cannot know the port"));
            code = 2;
            continue;
        }
        match check(reachable(listen), TIMEOUT) {
            Ok(()) => say(&mut std::io::stdout(), format_args!("{name}: ready")),
            Err(problem) => {
                say(&mut std::io::stderr(), format_args!("shopd: {name}: {problem}"));
                code = code.max(1);
            }
        }
    }
    ExitCode::from(code)
}

/// A pipe closed by its reader is no reason to be unhealthy.
fn say(to: &mut dyn Write, line: std::fmt::Arguments<'_>) {
    drop(writeln!(to, "{line}"));
}

fn asked(config: &Config, role: CheckedRole) -> Vec<(&'static str, SocketAddr)> {
    let every = [
        (CheckedRole::Gateway, "gateway", config.gateway.listen),
        (CheckedRole::Orders, "orders", config.orders.listen),
        (CheckedRole::Payments, "payments", config.payments.listen),
        (CheckedRole::Relay, "relay", config.relay.listen),
    ];
    let asked = every.into_iter().filter(|(of, _, _)| role == CheckedRole::All || role == *of);
    asked.map(|(_, name, listen)| (name, listen)).collect()
}

/// Where a listener on this address is reached from this machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// `Ok` only for a 200 within `timeout`.
fn check(address: SocketAddr, timeout: Duration) -> Result<(), String> {
    let answer = ask(address, timeout).map_err(|error| format!("{address} does not answer: {error}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or_default();
    match status {
        "200" => Ok(()),
        _ => {
            Err(format!("{address} is not ready: {} {}", head.lines().next().unwrap_or_default(), body.replace(['\r', '\n'], " ")))
        }
    }
}

/// One GET over a connection of its own; without a client library because a check runs every few seconds and should cost next to nothing.
fn ask(address: SocketAddr, timeout: Duration) -> std::io::Result<String> {
    let deadline = Instant::now() + timeout;
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(std::io::Error::from(std::io::ErrorKind::TimedOut)) } else { Ok(left) }
    };
    let mut connection = TcpStream::connect_timeout(&address, left()?)?;
    connection.set_write_timeout(Some(left()?))?;
    connection.write_all(format!("GET /health/ready HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut part = [0; 2048];
    loop {
        // Anew for each read: a trickle must not stretch the bound.
        connection.set_read_timeout(Some(left()?))?;
        let read = connection.read(&mut part)?;
        answer.extend_from_slice(&part[..read]);
        if read == 0 || answer.len() as u64 >= ANSWER_BYTES_MAX {
            return Ok(String::from_utf8_lossy(&answer).into_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread::JoinHandle;

    use super::*;

    /// Answers one connection with this text, or with silence until the asker leaves.
    fn server(answer: &'static str) -> (SocketAddr, JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut request = vec![0; 1024];
            let read = connection.read(&mut request).unwrap();
            if answer.is_empty() {
                drop(connection.read(&mut [0]));
            }
            connection.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        (address, thread)
    }

    #[test]
    fn only_a_200_is_ready() {
        let (address, thread) = server("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
        assert_eq!(check(address, TIMEOUT), Ok(()));
        assert!(thread.join().unwrap().starts_with("GET /health/ready HTTP/1.1\r\nHost: 127.0.0.1:"));
        let (address, thread) = server("HTTP/1.1 503 Service Unavailable\r\n\r\n{\"missing\":[\"database\"]}");
        let problem = check(address, TIMEOUT).unwrap_err();
        assert!(problem.contains("503") && problem.contains("database"), "{problem}");
        thread.join().unwrap();
    }

    #[test]
    fn silence_and_a_closed_port_are_not_ready_within_the_bound() {
        let (address, thread) = server("");
        let begun = Instant::now();
        assert!(check(address, Duration::from_millis(50)).is_err());
        assert!(begun.elapsed() < TIMEOUT);
        drop(thread.join());
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(check(closed, TIMEOUT).is_err());
    }

    #[test]
    fn a_role_is_asked_on_the_loopback_where_it_listens_on_any_address() {
        let of = |listen: &str| reachable(listen.parse().unwrap()).to_string();
        assert_eq!(of("0.0.0.0:8000"), "127.0.0.1:8000");
        assert_eq!(of("[::]:8000"), "[::1]:8000");
        assert_eq!(of("10.0.0.1:8000"), "10.0.0.1:8000");
        assert_eq!(asked(&Config::default(), CheckedRole::All).len(), 4);
        assert_eq!(asked(&Config::default(), CheckedRole::Relay), [("relay", "0.0.0.0:8083".parse().unwrap())]);
    }
}
