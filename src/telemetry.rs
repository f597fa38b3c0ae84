//! Logs. (placeholder until merged)
pub struct Incident(&'static str);
impl Incident {
    pub fn new(what: &'static str) -> Self {
        Self(what)
    }
    pub fn failed(&mut self, cause: &dyn std::fmt::Display) {
        tracing::warn!(%cause, what = self.0)
    }
    pub fn recovered(&mut self) {}
}
