//! Swagger UI, from the archive that is compiled in: nothing is loaded from elsewhere.
//!
//! The page is ours (the archive's own names another document); its parts are unpacked once, when first asked for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::sync::LazyLock;

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use bytes::Bytes;
use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED;
use zip::ZipArchive;
use zip::result::ZipError;

/// What the page needs of the archive's `dist` folder, and as what it is served.
const PARTS: [(&str, &str); 5] = [
    ("swagger-ui.css", "text/css; charset=utf-8"),
    ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    ("swagger-ui-standalone-preset.js", "text/javascript; charset=utf-8"),
    ("favicon-16x16.png", "image/png"),
    ("favicon-32x32.png", "image/png"),
];

/// No inline script, so that the page can forbid them.
const INITIALIZER: (&str, &str, &str) = (
    "initializer.js",
    "text/javascript; charset=utf-8",
    r##"window.onload = () => {
  window.ui = SwaggerUIBundle({
    url: "/swagger/v1/swagger.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    queryConfigEnabled: false,
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis, SwaggerUIStandalonePreset],
    layout: "BaseLayout",
  });
};
"##,
);

const PAGE: &str = r#"<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>shopd API</title>
  <link rel="stylesheet" href="/swagger/swagger-ui.css">
  <link rel="icon" type="image/png" href="/swagger/favicon-32x32.png" sizes="32x32">
  <link rel="icon" type="image/png" href="/swagger/favicon-16x16.png" sizes="16x16">
</head>
<body>
  <div id="swagger-ui"></div>
  <script src="/swagger/swagger-ui-bundle.js"></script>
  <script src="/swagger/swagger-ui-standalone-preset.js"></script>
  <script src="/swagger/initializer.js"></script>
</body>
</html>
"#;

const POLICY: &str = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'";

struct Asset {
    content_type: &'static str,
    bytes: Bytes,
}

static ASSETS: LazyLock<Result<BTreeMap<&'static str, Asset>, ZipError>> = LazyLock::new(unpack);

fn unpack() -> Result<BTreeMap<&'static str, Asset>, ZipError> {
    let mut archive = ZipArchive::new(Cursor::new(SWAGGER_UI_VENDORED))?;
    let mut assets = BTreeMap::new();
    for (name, content_type) in PARTS {
        let ending = format!("/dist/{name}");
        // One folder, named after the version, holds everything.
        let is_part = |path: &Cow<'_, str>| path.ends_with(&ending) && path.matches('/').count() == 2;
        let path = archive.file_names().filter_map(Result::ok).find(is_part).map(Cow::into_owned);
        let path = path.ok_or(ZipError::FileNotFound)?;
        let mut bytes = Vec::new();
        archive.by_name(&path)?.read_to_end(&mut bytes)?;
        assets.insert(name, Asset { content_type, bytes: bytes.into() });
    }
    let (name, content_type, text) = INITIALIZER;
    assets.insert(name, Asset { content_type, bytes: Bytes::from_static(text.as_bytes()) });
    Ok(assets)
}

pub fn page() -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/html; charset=utf-8"))
        .insert_header(("content-security-policy", POLICY))
        .insert_header(("x-content-type-options", "nosniff"))
        .body(PAGE)
}

/// One part of the page; `None` where it has none of this name.
///
/// # Errors
/// The archive compiled in cannot be read: a defect.
pub fn asset(name: &str) -> Result<Option<HttpResponse>, String> {
    let assets = ASSETS.as_ref().map_err(|error| format!("Swagger UI's archive: {error}"))?;
    Ok(assets.get(name).map(|asset| {
        HttpResponse::Ok()
            .insert_header((CONTENT_TYPE, asset.content_type))
            .insert_header((CACHE_CONTROL, "public, max-age=3600"))
            .insert_header(("x-content-type-options", "nosniff"))
            .body(asset.bytes.clone())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_the_page_names_is_compiled_in() {
        let named: Vec<&str> = PAGE.split('"').filter_map(|text| text.strip_prefix("/swagger/")).collect();
        assert_eq!(named.len(), 6);
        for name in named {
            let asset = ASSETS.as_ref().unwrap().get(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert!(asset.bytes.len() > 100, "{name}");
        }
        assert!(!PAGE.contains("http"));
        assert!(asset("../index.html").unwrap().is_none());
    }
}
