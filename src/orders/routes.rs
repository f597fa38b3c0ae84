//! `/api/Orders`: a handler extracts, calls and replies.

use std::future::{Ready, ready};
use std::time::{Duration, Instant};

use actix_web::dev::Payload;
use actix_web::http::Method;
use actix_web::web::Data;
use actix_web::{FromRequest, HttpRequest, HttpResponse};
use bytes::Bytes;
use futures::StreamExt;
use paperclip::actix::web::{self, ServiceConfig};
use uuid::Uuid;

use super::dto::{self, OrderBody, PlaceOrder};
use super::{Expected, ListOrders, OrderStream, Orders, Origin, PlaceError, Placed, Placing, Reason, Seen, Update};
use crate::db::DbError;
use crate::http::idempotency::{REPLAYED, Settled};
use crate::http::openapi::{self, DataType, Documented, In, RawOperation, api_v2_operation};
use crate::http::sse::{self, Events};
use crate::http::timeline::{self, INNER, Timeline};
use crate::http::websocket::{Closing, Handshake, Telling, WebSocket};
use crate::http::{
    self, Code, Json, OwnIdempotencyKey, PREFERENCE_APPLIED, Params, Paths, PreferWait, Problem, Reply, RequestContext, Routes,
};
use crate::user_id::UserId;

pub const COLLECTION: &str = "/api/Orders";
pub const ITEM: &str = "/api/Orders/{orderId}";
pub const EVENTS: &str = "/api/Orders/events";
pub const ITEM_EVENTS: &str = "/api/Orders/{orderId}/events";
pub const ITEM_WS: &str = "/api/Orders/{orderId}/ws";
pub const TIMELINE: &str = "/api/Orders/{orderId}/timeline";
const PATHS: Paths = Paths::new(&[COLLECTION, EVENTS, ITEM, ITEM_EVENTS, ITEM_WS, TIMELINE]);

/// The service's routes over `orders`, and its document.
pub fn routes(orders: Orders) -> Routes {
    let api = move |config: &mut ServiceConfig| {
        config.app_data(Data::new(orders.clone()));
        operations(config);
    };
    Routes::new().api(api).plain(inner).spelled(PATHS).document(&super::document())
}

/// What only the gateway asks; `Orders` is there already.
fn inner(config: &mut actix_web::web::ServiceConfig) {
    let resource = actix_web::web::resource(INNER).route(actix_web::web::get().to(part));
    config.service(resource.default_service(http::only(&[Method::GET])));
}

async fn part(orders: Data<Orders>, id: OrderId) -> Result<HttpResponse, Problem> {
    Ok(HttpResponse::Ok().json(orders.timeline(id.0).await?.ok_or_else(not_found)?))
}

/// The routes alone, for the document.
pub(super) fn operations(config: &mut ServiceConfig) {
    let collection = web::resource(COLLECTION).route(web::get().to(list)).route(web::post().to(place));
    config.service(collection.default_service(http::only(&[Method::GET, Method::POST])));
    let get_only = || http::only(&[Method::GET]);
    // Before the item's, whose id it would be.
    config.service(web::resource(EVENTS).route(web::get().to(events_of_user)).default_service(get_only()));
    config.service(web::resource(ITEM).route(web::get().to(get)).default_service(get_only()));
    config.service(web::resource(ITEM_EVENTS).route(web::get().to(events)).default_service(get_only()));
    config.service(web::resource(ITEM_WS).route(web::get().to(ws)).default_service(get_only()));
    config.service(web::resource(TIMELINE).route(web::get().to(timeline)).default_service(get_only()));
}

#[api_v2_operation(summary = "Place an order", operation_id = "placeOrder", tags(Orders))]
async fn place(
    orders: Data<Orders>,
    context: RequestContext,
    key: OwnIdempotencyKey,
    prefer: PreferWait,
    body: Json<PlaceOrder>,
) -> Result<Reply<OrderBody>, Problem> {
    let stamp = key.added;
    let deadline = context.deadline;
    let (order, origin) = (body.value.order(stamp), Origin { stamp, ..context.into() });
    let id = order.id;
    // Before it is there: how it ends cannot be missed then.
    let expected = prefer.0.map(|_| orders.expect_end(id));
    let settled = orders.place(order, origin, key.own.over(&body.bytes, placed)).await;
    let is_new = matches!(&settled, Settled::Done(Ok(placed)) if placed.is_new);
    let reply = settled.reply(placed)?;
    match prefer.0.zip(expected) {
        // Elsewhere: most do not wait, and each request's future is moved with room for this.
        Some((wait, expected)) => Box::pin(waited(&orders, reply, (wait, within(wait, deadline)), expected, is_new)).await,
        None => Ok(reply),
    }
}

/// Kept of the gateway's time, for the answer's way.
const ANSWER_TIME: Duration = Duration::from_millis(500);

/// The wait that the client prefers, where the gateway waits for the answer as long: of a request that it repeats a part of that is over.
fn within(wait: Duration, deadline: Option<Instant>) -> Duration {
    let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now()).saturating_sub(ANSWER_TIME);
    deadline.map_or(wait, |deadline| wait.min(left(deadline)))
}

/// The same answer with the order as it is once it has ended, or after `wait`, of what was preferred; a refusal at once, and at once also
/// where nobody can wait, which does not say that the preference was applied then.
async fn waited(
    orders: &Orders,
    reply: Reply<OrderBody>,
    (preferred, wait): (Duration, Duration),
    expected: Result<Expected, DbError>,
    is_new: bool,
) -> Result<Reply<OrderBody>, Problem> {
    let Some(id) = reply.success().and_then(|body| dto::id_of(body)) else { return Ok(reply) };
    let ended = async {
        // Under a key it is the order that was placed under it first.
        let expected = expected.and_then(|expected| if expected.id == id { Ok(expected) } else { orders.expect_end(id) });
        expected?.end(wait, is_new).await
    };
    // The order is accepted, whatever comes of the waiting.
    let reply = match ended.await {
        Ok(Some(order)) => reply.with_body(&order.into())?,
        Ok(None) => reply,
        Err(error) => {
            tracing::info!(%error, "an order was not waited for");
            return Ok(reply);
        }
    };
    Ok(reply.header(PREFERENCE_APPLIED, format!("wait={}", preferred.as_secs())))
}

fn placed(placed: Placing) -> Result<Reply<OrderBody>, Problem> {
    let Placed { order, replayed, .. } = placed?;
    let location = format!("{COLLECTION}/{}", order.id);
    let body = order.into();
    if replayed { Ok(Reply::ok(&body)?.header(REPLAYED, "true")) } else { Reply::created(&body, location) }
}

#[api_v2_operation(summary = "List orders, newest first", operation_id = "listOrders", tags(Orders))]
async fn list(orders: Data<Orders>, context: RequestContext, query: ListQuery) -> Result<Reply<Vec<OrderBody>>, Problem> {
    let page = orders.list(query.which).await?;
    let reply = Reply::ok(&page.orders.into_iter().map(OrderBody::from).collect())?;
    Ok(http::with_next(reply, &context, COLLECTION, &query.params, page.next.map(dto::cursor)))
}

#[api_v2_operation(summary = "One order", operation_id = "getOrder", tags(Orders))]
async fn get(orders: Data<Orders>, id: OrderId, req: HttpRequest) -> Result<Reply<OrderBody>, Problem> {
    let order = orders.get(id.0).await?.ok_or_else(not_found)?;
    let etag = dto::etag(&order);
    let reply = if http::if_none_match(&req, &etag) { Reply::not_modified() } else { Reply::ok(&order.into())? };
    Ok(reply.header("etag", etag))
}

#[api_v2_operation(summary = "One order's changes", operation_id = "streamOrder", tags(Orders))]
async fn events(orders: Data<Orders>, id: OrderId, after: After) -> Result<Events, Problem> {
    match orders.stream(id.0, after.0).await? {
        OrderStream::Unknown => Err(not_found()),
        OrderStream::Over => Ok(Events::Over),
        OrderStream::Updates(updates) => Ok(Events::Stream(Box::pin(updates.map(frame)))),
    }
}

#[api_v2_operation(summary = "The changes of all of a user's orders", operation_id = "streamOrders", tags(Orders))]
async fn events_of_user(orders: Data<Orders>, of: OfUser, after: After) -> Result<Events, Problem> {
    Ok(Events::Stream(Box::pin(orders.stream_of(of.0, after.0).await?.map(frame))))
}

#[api_v2_operation(summary = "One order's changes, over WebSocket", operation_id = "watchOrder", tags(Orders))]
async fn ws(orders: Data<Orders>, id: OrderId, after: After, handshake: Handshake) -> Result<WebSocket, Problem> {
    match orders.stream(id.0, after.0).await? {
        OrderStream::Unknown => Err(not_found()),
        OrderStream::Over => Ok(handshake.tell(futures::stream::empty())),
        OrderStream::Updates(updates) => Ok(handshake.tell(updates.map(telling))),
    }
}

#[api_v2_operation(summary = "Every hop of an order, with its time", operation_id = "getTimeline", tags(Orders))]
async fn timeline(orders: Data<Orders>, id: OrderId) -> Result<Reply<Timeline>, Problem> {
    Reply::ok(&timeline::merge(orders.timeline(id.0).await?.ok_or_else(not_found)?, None))
}

fn not_found() -> Problem {
    Problem::new(Code::OrderNotFound, "No order has this id.")
}

/// An update as a stream of server-sent events has it.
fn frame(update: Update) -> Bytes {
    match update {
        Update::Event(event) => event.frame.clone(),
        Update::Ended(reason) => {
            let name = if reason == Reason::Stopping { "closing" } else { "dropped" };
            sse::named(name, &format!(r#"{{"reason":"{}"}}"#, reason.as_str()))
        }
    }
}

/// An update as a WebSocket has it.
fn telling(update: Update) -> Telling {
    match update {
        Update::Event(event) => Telling::Text(event.json.clone()),
        Update::Ended(reason) => {
            let closing = if reason == Reason::Stopping { Closing::Away } else { Closing::TryAgain };
            Telling::Close(closing, reason.as_str())
        }
    }
}

impl From<RequestContext> for Origin {
    fn from(context: RequestContext) -> Self {
        Self { trace: context.trace, request_id: context.request_id, stamp: None }
    }
}

impl From<PlaceError> for Problem {
    fn from(error: PlaceError) -> Self {
        match error {
            PlaceError::Conflict => {
                Self::new(Code::OrderConflict, "An order with this id exists and differs in user, amount or description.")
            }
            PlaceError::Db(error) => error.into(),
        }
    }
}

/// The path's order id.
struct OrderId(Uuid);

impl FromRequest for OrderId {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let text = http::path_segment(req, "orderId");
        ready(text.and_then(|text| dto::parse_id(&text).map(Self).ok_or_else(|| dto::invalid_id("orderId"))))
    }
}

impl openapi::Schema for OrderId {}

impl Documented for OrderId {
    fn update_parameter(op: &mut RawOperation) {
        openapi::parameter(op, In::Path, "orderId", DataType::String, "The order's id, a UUID.");
    }
}

/// The request's `Last-Event-ID`.
struct After(Option<Seen>);

impl FromRequest for After {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(sse::last_event_id(req).map(Self))
    }
}

impl openapi::Schema for After {}

impl Documented for After {
    fn update_parameter(op: &mut RawOperation) {
        let description = "The id of the last event that the client has got: only later ones are sent.";
        openapi::parameter(op, In::Header, sse::LAST_EVENT_ID, DataType::String, description);
    }
}

/// The query's user, who must be named.
struct OfUser(UserId);

impl FromRequest for OfUser {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Params::of(req).and_then(|params| dto::user(&params)).map(Self))
    }
}

impl openapi::Schema for OfUser {}

impl Documented for OfUser {
    fn update_parameter(op: &mut RawOperation) {
        openapi::parameter(op, In::Query, "userId", DataType::String, "Whose orders.");
        for parameter in &mut op.parameters {
            if let openapi::Either::Right(parameter) = parameter
                && parameter.name == "userId"
            {
                parameter.required = true;
            }
        }
    }
}

/// The list's query, read, and as it was asked for the next page's link.
struct ListQuery {
    which: ListOrders,
    params: Params,
}

impl FromRequest for ListQuery {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Params::of(req).and_then(|params| Ok(Self { which: dto::list(&params)?, params })))
    }
}

impl openapi::Schema for ListQuery {}

impl Documented for ListQuery {
    fn update_parameter(op: &mut RawOperation) {
        openapi::parameter(op, In::Query, "userId", DataType::String, "Only this user's orders.");
        openapi::parameter(
            op,
            In::Query,
            "status",
            DataType::String,
            "Only orders in this status: New, Processing, Finished or Cancelled.",
        );
        openapi::parameter(op, In::Query, "limit", DataType::Integer, "The most orders to answer.");
        openapi::parameter(op, In::Query, "cursor", DataType::String, "Where to go on: an earlier page's `X-Next-Cursor`.");
    }
}
