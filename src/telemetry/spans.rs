//! Spans: what each role did for a trace, and how long that took, sent to a collector by OTLP (<https://opentelemetry.io/docs/specs/otlp/>)
//! where one is configured. Their names and attributes are OpenTelemetry's conventions for HTTP and messaging.
//!
//! A span is made when its work is done, from times that were taken anyway: a batch of four thousand records is four thousand spans, and
//! none of them may cost anything where nobody records. Where the collector is away or slow, spans are dropped, never work.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, Value};
use opentelemetry_otlp::{SpanExporter as Otlp, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanExporter, SpanLinks, SpanProcessor,
};
use uuid::Uuid;

use super::SharedIncident;
use crate::config::TelemetryConfig;
use crate::trace::TraceContext;

/// Spans of one role that wait to be sent; further ones are dropped.
const QUEUE_SPANS_MAX: usize = 16_384;
const EXPORT_SPANS_MAX: usize = 2_048;
const EXPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Bound on one request to the collector, and on sending what is left at the end.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);

static RECORDING: OnceLock<Recording> = OnceLock::new();

struct Recording {
    /// One a role, because each is a service of its own to who looks at traces.
    recorders: Vec<(&'static str, Recorder)>,
    trace_one_in: u32,
}

struct Recorder {
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
}

/// Why spans cannot be sent.
#[derive(Debug, thiserror::Error)]
#[error("telemetry.otlp_endpoint: {0}")]
pub struct SpansError(String);

/// Begins to record the spans of `roles`, once a process, where a collector is configured. Does not wait for it.
///
/// # Errors
/// An exporter that cannot be made.
pub fn begin(config: &TelemetryConfig, roles: &[&'static str]) -> Result<(), SpansError> {
    if config.otlp_endpoint.is_empty() || roles.is_empty() {
        return Ok(());
    }
    // The HTTP client wants one, though it speaks plain HTTP; another one that is there already does as well.
    drop(rustls::crypto::ring::default_provider().install_default());
    let recorder = |role: &'static str| Ok((role, Recorder::new(&config.otlp_endpoint, role)?));
    let recorders = roles.iter().map(|role| recorder(role)).collect::<Result<_, SpansError>>()?;
    let begun = RECORDING.set(Recording { recorders, trace_one_in: config.trace_one_in });
    begun.map_err(|_| SpansError("spans are recorded already".into()))?;
    tracing::info!(otlp_endpoint = config.otlp_endpoint, trace_one_in = config.trace_one_in, "spans are recorded");
    Ok(())
}

/// Sends what is left, within three seconds a role. Blocks.
pub fn end() {
    for (role, recorder) in RECORDING.get().iter().flat_map(|recording| &recording.recorders) {
        if let Err(error) = recorder.processor.shutdown_with_timeout(EXPORT_TIMEOUT) {
            tracing::info!(role, %error, "the last spans were not sent");
        }
    }
}

/// A trace that begins here, to be recorded or not as `telemetry.trace_one_in` has it.
pub fn new_trace() -> TraceContext {
    let root = TraceContext::new_root();
    match RECORDING.get() {
        Some(recording) if !is_chosen(&root, recording.trace_one_in) => root.unsampled(),
        _ => root,
    }
}

/// By the random bits that every process sees.
fn is_chosen(root: &TraceContext, one_in: u32) -> bool {
    (root.trace_bits() as u64).is_multiple_of(u64::from(one_in.max(1)))
}

/// Where a role's spans go; nowhere, in most processes.
#[derive(Clone, Copy)]
pub struct Tracer(Option<&'static Recorder>);

impl Tracer {
    /// Of a process that runs `role`.
    pub fn of(role: &str) -> Self {
        let recorders = RECORDING.get().map(|recording| recording.recorders.as_slice()).unwrap_or_default();
        Self(recorders.iter().find(|(of, _)| *of == role).map(|(_, recorder)| recorder))
    }

    /// Whether any span is wanted, to look at nothing otherwise.
    pub fn is_on(self) -> bool {
        self.0.is_some()
    }

    /// Whether spans of this trace are wanted.
    pub fn wants(self, context: &TraceContext) -> bool {
        self.is_on() && context.is_sampled()
    }

    /// Ends now what [`Span::begun`] describes.
    pub fn record(self, span: Span) {
        let Some(recorder) = self.0 else { return };
        metrics::counter!("shopd_trace_spans_total", "state" => "recorded").increment(1);
        recorder.processor.on_end(span.data(recorder.scope.clone(), SystemTime::now()));
    }
}

/// A piece of work that is done.
pub struct Span {
    name: Cow<'static, str>,
    kind: SpanKind,
    context: TraceContext,
    parent: Option<u64>,
    began: SystemTime,
    attributes: Vec<KeyValue>,
    events: Vec<Event>,
    failed: Option<Cow<'static, str>>,
}

/// What a span is to the one that asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Answers a request.
    Server,
    /// Makes one.
    Client,
    /// Puts a record onto the log.
    Producer,
    /// Takes one from it.
    Consumer,
}

impl Span {
    /// `context` is the span's own position, `parent` the span under which it lies.
    pub fn begun(
        name: impl Into<Cow<'static, str>>,
        work: Work,
        context: TraceContext,
        parent: Option<u64>,
        began: impl Into<SystemTime>,
    ) -> Self {
        let kind = match work {
            Work::Server => SpanKind::Server,
            Work::Client => SpanKind::Client,
            Work::Producer => SpanKind::Producer,
            Work::Consumer => SpanKind::Consumer,
        };
        let (attributes, events) = (Vec::with_capacity(8), Vec::new());
        Self { name: name.into(), kind, context, parent, began: began.into(), attributes, events, failed: None }
    }

    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.attributes.push(KeyValue::new(name, value));
        self
    }

    /// Something that happened at a moment of it.
    #[must_use]
    pub fn event(mut self, name: &'static str, at: impl Into<SystemTime>) -> Self {
        self.events.push(Event::new(name, at.into(), Vec::new(), 0));
        self
    }

    /// It did not do what was asked.
    #[must_use]
    pub fn failed(mut self, cause: impl Into<Cow<'static, str>>) -> Self {
        self.failed = Some(cause.into());
        self
    }

    fn data(self, instrumentation_scope: InstrumentationScope, ended: SystemTime) -> SpanData {
        let (trace_id, span_id) = (TraceId::from(self.context.trace_bits()), SpanId::from(self.context.span_bits()));
        let mut events = SpanEvents::default();
        events.events = self.events;
        SpanData {
            span_context: SpanContext::new(trace_id, span_id, TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: self.parent.map_or(SpanId::INVALID, SpanId::from),
            parent_span_is_remote: self.parent.is_some(),
            span_kind: self.kind,
            name: self.name,
            start_time: self.began,
            // Clocks are set back now and then.
            end_time: ended.max(self.began),
            attributes: self.attributes,
            dropped_attributes_count: 0,
            events,
            links: SpanLinks::default(),
            status: self.failed.map_or(Status::Unset, |description| Status::Error { description }),
            instrumentation_scope,
        }
    }
}

impl Recorder {
    fn new(endpoint: &str, role: &'static str) -> Result<Self, SpansError> {
        let exporter = Otlp::builder().with_http().with_endpoint(format!("{endpoint}/v1/traces")).with_timeout(EXPORT_TIMEOUT);
        let exporter = exporter.build().map_err(|error| SpansError(error.to_string()))?;
        let exporter = Reporting { exporter, incident: SharedIncident::new("sending spans") };
        let limits = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE_SPANS_MAX)
            .with_max_export_batch_size(EXPORT_SPANS_MAX)
            .with_scheduled_delay(EXPORT_INTERVAL)
            .build();
        let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(limits).build();
        // Lies over what the environment says by OTEL_RESOURCE_ATTRIBUTES.
        let resource = Resource::builder()
            .with_service_name(format!("shopd-{role}"))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("service.instance.id", Uuid::new_v4().to_string()));
        processor.set_resource(&resource.build());
        let scope = InstrumentationScope::builder("shopd").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { processor, scope })
    }
}

/// Says once when the collector is away, and counts.
#[derive(Debug)]
struct Reporting<E> {
    exporter: E,
    incident: SharedIncident,
}

impl<E: SpanExporter> SpanExporter for Reporting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let sent = self.exporter.export(batch).await;
        match &sent {
            Ok(()) => self.incident.recovered(0),
            Err(error) => self.incident.failed(0, error),
        }
        let state = if sent.is_ok() { "sent" } else { "failed" };
        metrics::counter!("shopd_trace_spans_total", "state" => state).increment(spans);
        // Told already; the library would say it each time.
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
