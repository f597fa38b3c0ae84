//! `/api/Account`: a handler extracts, calls and replies.

use std::future::{Ready, ready};

use actix_web::dev::Payload;
use actix_web::http::Method;
use actix_web::web::Data;
use actix_web::{FromRequest, HttpRequest, HttpResponse};
use paperclip::actix::web::{self, ServiceConfig};
use uuid::Uuid;

use super::dto::{self, AccountBody, BalanceBody, DepositBody, TransactionBody};
use super::{DepositError, Deposited, OpenError, Opened, Payments};
use crate::http::openapi::{self, DataType, Documented, In, RawOperation, api_v2_operation};
use crate::http::timeline::INNER;
use crate::http::{self, Code, IdempotencyKey, Ignored, Json, Params, Paths, Problem, Reply, RequestContext, Routes};
use crate::user_id::UserId;

pub const ACCOUNT: &str = "/api/Account/{userId}";
pub const DEPOSIT: &str = "/api/Account/{userId}/deposit";
pub const BALANCE: &str = "/api/Account/{userId}/balance";
pub const TRANSACTIONS: &str = "/api/Account/{userId}/transactions";
const PATHS: Paths = Paths::new(&[ACCOUNT, DEPOSIT, BALANCE, TRANSACTIONS]);

/// The service's routes over `payments`, and its document.
pub fn routes(payments: Payments) -> Routes {
    let api = move |config: &mut ServiceConfig| {
        config.app_data(Data::new(payments.clone()));
        operations(config);
    };
    Routes::new().api(api).plain(inner).spelled(PATHS).document(&super::document())
}

/// What only the gateway asks; `Payments` is there already.
fn inner(config: &mut actix_web::web::ServiceConfig) {
    let resource = actix_web::web::resource(INNER).route(actix_web::web::get().to(timeline));
    config.service(resource.default_service(http::only(&[Method::GET])));
}

async fn timeline(payments: Data<Payments>, req: HttpRequest) -> Result<HttpResponse, Problem> {
    let text = http::path_segment(&req, "orderId")?;
    let id = Uuid::try_parse(&text).map_err(|_| Problem::new(Code::InvalidOrderId, "The order id must be a UUID."))?;
    let unknown = || Problem::new(Code::OrderNotFound, "Nothing is decided on an order with this id.");
    Ok(HttpResponse::Ok().json(payments.timeline(id).await?.ok_or_else(unknown)?))
}

/// The routes alone, for the document.
pub(super) fn operations(config: &mut ServiceConfig) {
    let (get, post) = (|| http::only(&[Method::GET]), || http::only(&[Method::POST]));
    config.service(web::resource(ACCOUNT).route(web::post().to(open)).default_service(post()));
    config.service(web::resource(DEPOSIT).route(web::post().to(deposit)).default_service(post()));
    config.service(web::resource(BALANCE).route(web::get().to(balance)).default_service(get()));
    config.service(web::resource(TRANSACTIONS).route(web::get().to(transactions)).default_service(get()));
}

#[api_v2_operation(summary = "Open the user's one account", operation_id = "openAccount", tags(Payments))]
async fn open(payments: Data<Payments>, user: User, key: IdempotencyKey, body: Ignored) -> Result<Reply<AccountBody>, Problem> {
    payments.open_account(user.0, key.over(&body.bytes, opened)).await.reply(opened)
}

fn opened(opened: Opened) -> Result<Reply<AccountBody>, Problem> {
    Reply::ok(&opened?.into())
}

#[api_v2_operation(summary = "Deposit money", operation_id = "deposit", tags(Payments))]
async fn deposit(
    payments: Data<Payments>,
    user: User,
    key: IdempotencyKey,
    body: Json<DepositBody>,
) -> Result<Reply<AccountBody>, Problem> {
    payments.deposit(user.0, body.value.0, key.over(&body.bytes, deposited)).await.reply(deposited)
}

fn deposited(deposited: Deposited) -> Result<Reply<AccountBody>, Problem> {
    Reply::ok(&deposited?.into())
}

#[api_v2_operation(summary = "The balance", operation_id = "getBalance", tags(Payments))]
async fn balance(payments: Data<Payments>, user: User) -> Result<Reply<BalanceBody>, Problem> {
    Reply::ok(&payments.account(&user.0).await?.ok_or_else(no_account)?.into())
}

#[api_v2_operation(summary = "The account's ledger, newest first", operation_id = "listTransactions", tags(Payments))]
async fn transactions(
    payments: Data<Payments>,
    context: RequestContext,
    user: User,
    query: LedgerQuery,
) -> Result<Reply<Vec<TransactionBody>>, Problem> {
    let page = payments.transactions(&user.0, query.limit, query.before).await?.ok_or_else(no_account)?;
    let reply = Reply::ok(&page.transactions.into_iter().map(TransactionBody::from).collect())?;
    let path = TRANSACTIONS.replace("{userId}", &http::escape(user.0.as_str()));
    Ok(http::with_next(reply, &context, &path, &query.params, page.next.map(dto::cursor)))
}

fn no_account() -> Problem {
    Problem::new(Code::AccountNotFound, "No account exists for this user.")
}

impl From<OpenError> for Problem {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Exists => Self::new(Code::AccountExists, "Account already exists for this user"),
            OpenError::Db(error) => error.into(),
        }
    }
}

impl From<DepositError> for Problem {
    fn from(error: DepositError) -> Self {
        match error {
            DepositError::NoAccount => no_account(),
            DepositError::BalanceTooLarge => Self::new(Code::AmountTooLarge, "The balance would be more than the books can hold."),
            DepositError::Db(error) => error.into(),
        }
    }
}

/// The path's user.
struct User(UserId);

impl FromRequest for User {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let invalid = |error: crate::user_id::UserIdError| Problem::invalid("userId", error.to_string());
        ready(http::path_segment(req, "userId").and_then(|text| UserId::new(text).map(Self).map_err(invalid)))
    }
}

impl openapi::Schema for User {}

impl Documented for User {
    fn update_parameter(op: &mut RawOperation) {
        openapi::parameter(op, In::Path, "userId", DataType::String, "1 to 128 characters, none of them a control character.");
    }
}

/// The ledger's query, read, and as it was asked for the next page's link.
struct LedgerQuery {
    limit: i64,
    before: Option<i64>,
    params: Params,
}

impl FromRequest for LedgerQuery {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let read = |params| dto::page(&params).map(|(limit, before)| Self { limit, before, params });
        ready(Params::of(req).and_then(read))
    }
}

impl openapi::Schema for LedgerQuery {}

impl Documented for LedgerQuery {
    fn update_parameter(op: &mut RawOperation) {
        openapi::parameter(op, In::Query, "limit", DataType::Integer, "The most entries to answer.");
        openapi::parameter(op, In::Query, "cursor", DataType::String, "Where to go on: an earlier page's `X-Next-Cursor`.");
    }
}
