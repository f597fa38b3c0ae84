//! Composition only; one module a role.

/// Why a role ended other than by a clean stop.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RoleError(pub String);

macro_rules! absent {
    ($($role:ident)+) => {$(
        pub mod $role {
            use super::RoleError;
            use crate::config::Config;
            use crate::shutdown::Shutdown;

            pub async fn run(_config: Config, _stop: Shutdown) -> Result<(), RoleError> {
                Err(RoleError(concat!(stringify!($role), " is not in this build").into()))
            }
        }
    )+};
}

absent! { gateway orders payments relay all migrate }

pub mod openapi {
    use super::RoleError;

    pub fn run() -> Result<(), RoleError> {
        Err(RoleError("openapi is not in this build".into()))
    }
}
