//! One measured run under callgrind, and what its output file says of it.
//!
//! Only what our own program does itself is counted. The C library chooses its memory and string functions by the machine's CPU and
//! differs between distributions, so its instructions are left out; the calls to its allocator are counted instead, exactly.

use std::path::Path;
use std::process::{Command, Stdio};

use super::Result;

/// What one run of a case takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    pub instructions: u64,
    pub allocations: u64,
}

/// The function of `main.rs` from whose beginning to whose end is counted.
const MEASURED: &str = "gate::measured";
const ALLOCATE: [&str; 6] = ["malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "memalign"];

/// Runs `program` with `words` under callgrind, which writes to `out` and beside it.
pub fn run(program: &Path, words: &[&str], out: &Path) -> Result<Cost> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--quiet", "--compress-strings=no", "--compress-pos=no", "--dump-line=no"]);
    // What came before is written to a file of its own, the first, and counting begins anew. (`--toggle-collect` would count calls
    // of before as well.)
    valgrind.args(["--dump-before", "--dump-after"].map(|option| format!("{option}={MEASURED}")));
    valgrind.arg(format!("--callgrind-out-file={}", out.display()));
    let output = valgrind.arg(program).args(words).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("valgrind does not start (scripts/need.sh test installs it): {error}"))?;
    let case = words.join(" ");
    if !output.status.success() {
        return Err(format!("{case} under valgrind: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    let profile = std::fs::read_to_string(out.with_added_extension("2"));
    let profile = profile.map_err(|error| format!("{case}: callgrind did not see {MEASURED}: {error}"))?;
    let name = program.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let cost = cost(&profile, name);
    if cost.instructions == 0 {
        return Err(format!("{case}: callgrind counted nothing of {name} in {}", out.display()).into());
    }
    Ok(cost)
}

/// Sums what the functions of the object file `program` cost themselves, and how often any allocator was called.
///
/// The format is callgrind's, with whole names and absolute positions: `ob=` begins an object, other `key=value` lines are names;
/// a line of numbers is a position and a cost; the one after `calls=` is of the function called, and is counted there.
pub fn cost(profile: &str, program: &str) -> Cost {
    let mut cost = Cost { instructions: 0, allocations: 0 };
    let (mut ours, mut of_callee, mut callee) = (false, false, "");
    for line in profile.lines() {
        if let Some(object) = line.strip_prefix("ob=") {
            ours = object.rsplit('/').next() == Some(program);
        } else if let Some(function) = line.strip_prefix("cfn=") {
            callee = function;
        } else if let Some(calls) = line.strip_prefix("calls=") {
            of_callee = true;
            let count = calls.split(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0);
            if ours && ALLOCATE.contains(&callee) {
                cost.allocations += count;
            }
        } else if line.starts_with(|c: char| c.is_ascii_digit() || c == '+' || c == '-' || c == '*') {
            if ours && !of_callee {
                cost.instructions += line.split(' ').nth(1).and_then(|count| count.parse().ok()).unwrap_or(0u64);
            }
            of_callee = false;
        }
    }
    cost
}
