//! `/api/Orders`: a handler extracts, calls and replies.

use std::future::{Ready, ready};

use actix_web::dev::Payload;
use actix_web::http::Method;
use actix_web::web::Data;
use actix_web::{FromRequest, HttpRequest};
use paperclip::actix::web::{self, ServiceConfig};
use uuid::Uuid;

use super::dto::{self, OrderBody, PlaceOrder};
use super::{ListOrders, Orders, Origin, PlaceError, Placed, Placing};
use crate::http::idempotency::REPLAYED;
use crate::http::openapi::{self, DataType, Documented, In, RawOperation, api_v2_operation};
use crate::http::{self, Code, IdempotencyKey, Json, Params, Problem, Reply, RequestContext, Routes};

pub const COLLECTION: &str = "/api/Orders";
pub const ITEM: &str = "/api/Orders/{orderId}";

/// The service's routes over `orders`, and its document.
pub fn routes(orders: Orders) -> Routes {
    let api = move |config: &mut ServiceConfig| {
        config.app_data(Data::new(orders.clone()));
        operations(config);
    };
    Routes::new().api(api).document(&super::document())
}

/// The routes alone, for the document.
pub(super) fn operations(config: &mut ServiceConfig) {
    let collection = web::resource(COLLECTION).route(web::get().to(list)).route(web::post().to(place));
    config.service(collection.default_service(http::only(&[Method::GET, Method::POST])));
    config.service(web::resource(ITEM).route(web::get().to(get)).default_service(http::only(&[Method::GET])));
}

#[api_v2_operation(summary = "Place an order", operation_id = "placeOrder", tags(Orders))]
async fn place(
    orders: Data<Orders>,
    context: RequestContext,
    key: IdempotencyKey,
    body: Json<PlaceOrder>,
) -> Result<Reply<OrderBody>, Problem> {
    let stamp = key.added();
    let (order, origin) = (body.value.order(stamp), Origin { stamp, ..context.into() });
    orders.place(order, origin, key.own().over(&body.bytes, placed)).await.reply(placed)
}

fn placed(placed: Placing) -> Result<Reply<OrderBody>, Problem> {
    let Placed { order, replayed } = placed?;
    let location = format!("{COLLECTION}/{}", order.id);
    let body = order.into();
    if replayed { Ok(Reply::ok(&body)?.header(REPLAYED, "true")) } else { Reply::created(&body, &location) }
}

#[api_v2_operation(summary = "List orders, newest first", operation_id = "listOrders", tags(Orders))]
async fn list(orders: Data<Orders>, context: RequestContext, query: ListQuery) -> Result<Reply<Vec<OrderBody>>, Problem> {
    let page = orders.list(query.which).await?;
    let reply = Reply::ok(&page.orders.into_iter().map(OrderBody::from).collect())?;
    Ok(http::with_next(reply, &context, COLLECTION, &query.params, page.next.map(dto::cursor)))
}

#[api_v2_operation(summary = "One order", operation_id = "getOrder", tags(Orders))]
async fn get(orders: Data<Orders>, id: OrderId, req: HttpRequest) -> Result<Reply<OrderBody>, Problem> {
    let not_found = || Problem::new(Code::OrderNotFound, "No order has this id.");
    let order = orders.get(id.0).await?.ok_or_else(not_found)?;
    let etag = dto::etag(&order);
    let reply = if http::if_none_match(&req, &etag) { Reply::not_modified() } else { Reply::ok(&order.into())? };
    Ok(reply.header("etag", &etag))
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
