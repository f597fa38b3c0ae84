//! What a worker thread does with a connection: learns its protocol, then serves it with the one instance of the application that the
//! thread has, until it ends or the server stops.

use std::convert::Infallible;
use std::rc::Rc;
use std::time::Instant;

use actix_http::{HttpService, KeepAlive, Protocol as HttpProtocol, Request, ServiceConfig};
use actix_server::GracefulShutdownSignal;
use actix_service::{
    IntoService, IntoServiceFactory, Service, ServiceFactory, ServiceFactoryExt, fn_factory, fn_service, map_config,
};
use actix_web::Error;
use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{AppConfig, ServiceResponse};
use std::time::Duration;
use tokio::net::TcpStream;

use super::batch::Batching;
use super::connection::Connection;
use super::exchange::{Bounds, Exchange};
use super::expect::expect;
use super::greeting::{Protocol, greet};
use super::h2;

/// How long a connection that ends takes in what its client still sends, so that the answer before reaches it.
const DISCONNECT_TIME_MAX: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub(super) struct Serving {
    pub role: &'static str,
    /// The port is behind the gateway.
    pub inner: bool,
    pub bounds: Bounds,
    pub stop: GracefulShutdownSignal,
}

impl Serving {
    /// Made once a worker thread; `app` makes its application.
    pub(super) fn factory<I, A, B>(
        self,
        app: impl Fn() -> I + 'static,
    ) -> impl ServiceFactory<TcpStream, Config = (), Response = (), Error = Infallible, InitError = ()>
    where
        I: IntoServiceFactory<A, Request> + 'static,
        A: ServiceFactory<Request, Config = AppConfig, Response = ServiceResponse<B>, Error = Error> + 'static,
        A::InitError: std::fmt::Debug,
        A::Service: 'static,
        B: MessageBody + 'static,
    {
        fn_factory(move || {
            let serving = self.clone();
            let app = app().into_factory().map_err(|error: Error| error.error_response());
            async move {
                let app = map_config(app, |()| AppConfig::default()).new_service(()).await.map_err(|_| ())?;
                let app = Rc::new(app);
                let stop = serving.stop.clone();
                let (role, inner) = (serving.role, serving.inner);
                let shared = Batching { app: app.clone(), role, inner, config: ServiceConfig::default() };
                // Time is the connection's own: the framework's looks at it before it looks at what has come.
                let http1 = HttpService::<Connection, _, _>::build()
                    .keep_alive(KeepAlive::Os)
                    .client_request_timeout(Duration::ZERO)
                    .client_disconnect_timeout(DISCONNECT_TIME_MAX)
                    .graceful_shutdown_signal(move || {
                        let stop = stop.clone();
                        async move { stop.notified().await }
                    })
                    .on_connect_ext(|connection: &Connection, data| drop(data.insert(connection.exchange.clone())))
                    .expect(fn_service(move |request: Request| expect(request, role, inner)))
                    .finish(fn_factory(move || std::future::ready(Ok::<_, ()>(shared.clone()))))
                    .new_service(())
                    .await?;
                let http1 = Rc::new(http1);
                let serve = move |stream: TcpStream| {
                    let (serving, app, http1) = (serving.clone(), app.clone(), http1.clone());
                    async move {
                        serving.serve(stream, app, &*http1).await;
                        Ok::<_, Infallible>(())
                    }
                };
                Ok::<_, ()>(serve.into_service())
            }
        })
    }

    async fn serve<A, B, H>(&self, stream: TcpStream, app: Rc<A>, http1: &H)
    where
        A: Service<Request, Response = ServiceResponse<B>>,
        B: MessageBody,
        A::Error: Into<actix_http::Response<BoxBody>>,
        H: Service<(Connection, HttpProtocol, Option<std::net::SocketAddr>), Response = ()>,
        H::Error: std::fmt::Display,
    {
        let opened = Instant::now();
        let peer = stream.peer_addr().ok();
        // Fails only where the client has gone.
        let _ = stream.set_nodelay(true);
        let greeted = tokio::select! {
            biased;
            greeted = greet(stream, opened + self.bounds.head) => greeted,
            // Nothing is asked yet.
            () = self.stop.notified() => return,
        };
        // One that says nothing, or leaves, is told nothing.
        let Ok(Some((protocol, socket))) = greeted else { return };
        match protocol {
            Protocol::Http1 => {
                let connection = Connection::new(socket, Exchange::new(self.bounds, opened), self.role);
                if let Err(error) = http1.call((connection, HttpProtocol::Http1, peer)).await {
                    tracing::debug!(?peer, %error, "a connection ended");
                }
            }
            Protocol::Http2 => {
                let port = h2::Port { role: self.role, inner: self.inner, bounds: self.bounds };
                if let Err(error) = h2::serve(socket, peer, app, port, self.stop.notified()).await {
                    tracing::debug!(?peer, %error, "an HTTP/2 connection ended");
                }
            }
        }
    }
}
