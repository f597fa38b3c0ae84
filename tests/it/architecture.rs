//! Who may import whom: the table of docs/ARCHITECTURE.md, held against the sources.

use std::path::{Path, PathBuf};

/// A module, and what of ours it may import beside itself.
const MAY_IMPORT: [(&str, &[&str]); 21] = [
    ("money", &[]),
    ("user_id", &[]),
    ("trace", &[]),
    ("json", &[]),
    ("faults", &[]),
    ("shutdown", &[]),
    ("contracts", &["money", "user_id", "trace", "json"]),
    ("tls", &[]),
    ("turns", &[]),
    ("config", &["cli", "tls"]),
    ("telemetry", &["cli", "config", "shutdown", "trace"]),
    ("db", &["config", "tls", "turns", "shutdown", "telemetry", "faults"]),
    ("http", &["config", "db", "shutdown", "telemetry", "trace", "money", "user_id", "json"]),
    ("messaging", &["contracts", "db", "config", "tls", "turns", "shutdown", "telemetry", "trace", "faults"]),
    ("orders", &["contracts", "money", "user_id", "trace", "json", "http", "messaging", "db", "shutdown", "telemetry", "faults"]),
    ("payments", &["contracts", "money", "user_id", "trace", "json", "http", "messaging", "db", "faults"]),
    ("audit", &["orders", "payments", "messaging", "contracts", "db"]),
    ("relay", &["messaging", "contracts", "db", "config", "shutdown", "telemetry", "trace", "faults"]),
    ("gateway", &["http", "config", "shutdown", "trace", "money", "user_id", "json", "telemetry"]),
    ("healthcheck", &["cli", "config"]),
    ("embedded", &["config", "db", "shutdown"]),
];

/// What messaging may know of the contracts: the envelope, no event.
const ENVELOPE_ONLY: [&str; 3] = ["Envelope", "Headers", "Span"];

#[test]
fn every_module_imports_only_what_the_table_allows() {
    let mut wrong = Vec::new();
    for (module, allowed) in MAY_IMPORT {
        for (file, line, path) in imports(module) {
            let target = path.split("::").next().unwrap_or_default();
            if target != module && !allowed.contains(&target) {
                wrong.push(format!("{}:{line} {module} imports crate::{path}", file.display()));
            }
            if module == "messaging" && target == "contracts" && !ENVELOPE_ONLY.iter().any(|name| path.contains(name)) {
                wrong.push(format!("{}:{line} messaging names an event: crate::{path}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The test above must be able to fail: `orders` does import things, and each is found.
#[test]
fn imports_are_found_where_there_are_some() {
    let found: Vec<_> =
        imports("orders").into_iter().map(|(_, _, path)| path.split("::").next().unwrap_or_default().to_owned()).collect();
    for expected in ["contracts", "db", "http", "messaging", "money"] {
        assert!(found.iter().any(|found| found == expected), "{expected} is not among {found:?}");
    }
}

#[test]
fn money_never_meets_a_float() {
    for module in ["money", "orders", "payments", "contracts"] {
        for file in sources(module) {
            let text = std::fs::read_to_string(&file).unwrap();
            for (n, line) in text.lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                let float = code.split(|c: char| !c.is_alphanumeric()).any(|word| word == "f64" || word == "f32");
                assert!(!float, "{}:{}: {line}", file.display(), n + 1);
            }
        }
    }
}

#[test]
fn the_image_bears_the_version_of_the_crate() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Containerfile")).unwrap();
    let versions: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("ARG VERSION=")).collect();
    assert_eq!(versions, [env!("CARGO_PKG_VERSION")]);
}

/// File, line and path after `crate::` of every import or use in a module.
fn imports(module: &str) -> Vec<(PathBuf, usize, String)> {
    let mut found = Vec::new();
    for file in sources(module) {
        let text = std::fs::read_to_string(&file).unwrap();
        for (n, line) in text.lines().enumerate() {
            // `pub(in crate::http)` imports nothing.
            let code = line.split("//").next().unwrap_or_default().replace("(in crate::", "(in ");
            for part in code.split("crate::").skip(1) {
                let end = part.find([';', ' ', '(', ')', '<', '>', ',', '.']).filter(|_| !part.contains('{')).unwrap_or(part.len());
                found.push((file.clone(), n + 1, part[..end].to_owned()));
            }
        }
    }
    found
}

fn sources(module: &str) -> Vec<PathBuf> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders = vec![src.join(module)];
    files.extend(Some(src.join(format!("{module}.rs"))).filter(|file| file.exists()));
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    assert!(!files.is_empty(), "no sources of {module}");
    files
}
