//! The layers that settings come from, as figment providers that remember where each value was written.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::Path;

use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Tag, Value};
use figment::{Error, Figment, Metadata, Profile, Provider};

use super::kinds::Raw;
use super::mistakes::{Mistakes, shown, suggestion};
use super::settings::{SETTINGS, Setting};

/// The most bytes of a settings file or of a mounted secret.
const FILE_BYTES_MAX: u64 = 1 << 20;
const PREFIX: &str = "SHOPD__";
const FILE_SUFFIX: &str = "_FILE";

/// What the figment's metadata call the two kinds of layers.
const FROM_FILE: &str = "file";
const FROM_VARIABLE: &str = "variable";

/// One layer, a whole file or one variable.
struct Layer {
    kind: &'static str,
    /// The file's path or the variable's name.
    source: String,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.kind).source(figment::Source::Custom(self.source.clone()))
    }

    fn data(&self) -> Result<Map<Profile, Dict>, Error> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

/// Where a setting's value was written, to name it in a mistake.
pub(super) enum Origin {
    File(String),
    Variable(String),
}

/// The value of a setting in the uppermost layer that has one.
pub(super) fn value_of(figment: &Figment, setting: &Setting) -> Option<(Raw, Origin)> {
    let value = figment.find_value(setting.key).ok()?;
    let metadata = figment.get_metadata(value.tag())?;
    let source = metadata.source.as_ref().and_then(figment::Source::custom).unwrap_or_default().to_owned();
    let origin = if metadata.name == FROM_VARIABLE { Origin::Variable(source) } else { Origin::File(source) };
    Some((raw(&value), origin))
}

fn raw(value: &Value) -> Raw {
    match value {
        Value::String(_, text) => Raw::Text(text.clone()),
        Value::Char(_, c) => Raw::Text(c.to_string()),
        Value::Num(_, number) => number.to_i128().map_or(Raw::Other("a fraction"), |whole| Raw::Text(whole.to_string())),
        Value::Array(_, items) => {
            let texts: Option<Vec<String>> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
            texts.map_or(Raw::Other("an array of anything but strings"), Raw::List)
        }
        Value::Bool(..) => Raw::Other("a boolean"),
        Value::Dict(..) => Raw::Other("a table or a date"),
        Value::Empty(..) => Raw::Other("empty"),
    }
}

/// Puts a TOML file over `figment`; what is wrong with it goes to `mistakes`.
pub(super) fn with_file(figment: Figment, path: &Path, mistakes: &mut Mistakes) -> Figment {
    let name = path.display().to_string();
    let text = match read(path) {
        Ok(text) => text,
        Err(problem) => {
            mistakes.add(name, format!("cannot be read: {problem}"));
            return figment;
        }
    };
    match Toml::from_str::<Dict>(&text) {
        Ok(values) => figment.merge(Layer { kind: FROM_FILE, values: known(values, &name, mistakes), source: name }),
        Err(error) => {
            // Not the error's own display: it quotes the line, which may be the one with the password.
            let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let at = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            mistakes.add(name, format!("{at}{}", error.message().replace('\n', ", ")));
            figment
        }
    }
}

/// Those of a file's values that are settings; the others are mistakes.
fn known(values: Dict, file: &str, mistakes: &mut Mistakes) -> Dict {
    let sections: BTreeMap<&str, ()> = SETTINGS.iter().map(|setting| (section_and_key(setting).0, ())).collect();
    let mut kept = Dict::new();
    for (section, value) in values {
        let name = section.escape_debug().to_string();
        if !sections.contains_key(section.as_str()) {
            mistakes.add(&name, format!("there is no such section{} (in {file})", suggestion(&section, sections.keys().copied())));
            continue;
        }
        let Value::Dict(tag, keys) = value else {
            mistakes.add(&name, format!("must be a section, [{name}] (in {file})"));
            continue;
        };
        let mut settings = Dict::new();
        for (key, value) in keys {
            let full = format!("{section}.{key}");
            if SETTINGS.iter().any(|setting| setting.key == full) {
                settings.insert(key, value);
            } else {
                let hint = suggestion(&full, SETTINGS.iter().map(|setting| setting.key));
                mistakes.add(full.escape_debug(), format!("there is no such setting{hint} (in {file})"));
            }
        }
        kept.insert(section, Value::Dict(tag, settings));
    }
    kept
}

/// Puts the environment over `figment`, each value as the text it is.
pub(super) fn with_environment(mut figment: Figment, environment: &[(OsString, OsString)], mistakes: &mut Mistakes) -> Figment {
    let mut ours: BTreeMap<String, &OsString> = BTreeMap::new();
    for (name, value) in environment {
        let name = name.to_string_lossy();
        // In any case, so that `shopd__orders__listen` is a mistake and not silently nothing.
        if name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX)) {
            ours.insert(name.into_owned(), value);
        }
    }
    for setting in SETTINGS {
        let variable = setting.variable();
        let file_variable = format!("{variable}{FILE_SUFFIX}");
        let value = match (ours.remove(&variable), ours.remove(&file_variable)) {
            (None, None) => continue,
            (Some(_), Some(_)) => {
                mistakes.add(&variable, format!("{file_variable} is given too; only one of them may be"));
                continue;
            }
            (Some(value), None) => value.to_str().map(|text| (variable.clone(), text.to_owned())).ok_or("is not UTF-8".to_owned()),
            (None, Some(path)) => read(Path::new(path))
                .map(|text| (file_variable.clone(), text.trim_end_matches(['\r', '\n']).to_owned()))
                .map_err(|problem| format!("the file cannot be read: {problem}{}", where_it_is(setting, path))),
        };
        match value {
            Ok((source, text)) => {
                let (section, key) = section_and_key(setting);
                let leaf = Dict::from([(key.to_owned(), Value::String(Tag::Default, text))]);
                let values = Dict::from([(section.to_owned(), Value::Dict(Tag::Default, leaf))]);
                figment = figment.merge(Layer { kind: FROM_VARIABLE, source, values });
            }
            Err(problem) if problem == "is not UTF-8" => mistakes.add(&variable, problem),
            Err(problem) => mistakes.add(&file_variable, problem),
        }
    }
    for name in ours.into_keys() {
        let suffix = if name.to_uppercase().ends_with(FILE_SUFFIX) { FILE_SUFFIX } else { "" };
        let variables: Vec<String> = SETTINGS.iter().map(|setting| setting.variable() + suffix).collect();
        let hint = suggestion(&name, variables.iter().map(String::as_str));
        mistakes.add(name.escape_debug(), format!("there is no such setting{hint}"));
    }
    figment
}

/// The path of a setting's file, unless the setting is a secret, which may have been given in the path's place.
fn where_it_is(setting: &Setting, path: &OsString) -> String {
    let secret = setting.key.ends_with("database_url") || setting.key.ends_with("password");
    if secret { String::new() } else { format!(": {}", shown(&path.to_string_lossy())) }
}

fn section_and_key(setting: &Setting) -> (&'static str, &'static str) {
    setting.key.split_once('.').unwrap_or((setting.key, ""))
}

/// A whole file as text, bounded.
fn read(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("it is longer than {FILE_BYTES_MAX} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".into())
}
