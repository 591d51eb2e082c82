//! tonic's usual way to serve a stream: the generated service, a broadcast channel for each tenant, tonic's codec and its
//! server, on tokio's default runtime.

use super::{Orders, Source, announce};
use futures_util::stream::{Stream, unfold};
use prost::Message as _;
use std::pin::Pin;
use tokio::sync::broadcast::{self, Receiver, Sender};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tuplewatch::api::grpc::proto::watch_server::{Watch, WatchServer};
use tuplewatch::api::grpc::proto::{WatchRequest, WatchResponse};

pub(super) fn serve(source: Source) {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).unwrap().with_nodelay(Some(true));
        announce(incoming.local_addr().unwrap());
        let messages: Vec<WatchResponse> = (0..source.messages).map(|number| decoded(&source, number)).collect();
        // Large enough that no subscriber ever misses a message.
        let capacity = source.messages.div_ceil(source.tenants as u64).max(1) as usize;
        let tenants: Vec<_> = (0..source.tenants).map(|_| broadcast::channel(capacity).0).collect();
        let service = WatchServer::new(Service { source, tenants: tenants.clone() });
        tokio::select! {
            served = Server::builder().add_service(service).serve_with_incoming(incoming) => served.unwrap(),
            () = publish(messages, &tenants) => {}
        }
    });
}

fn decoded(source: &Source, number: u64) -> WatchResponse {
    WatchResponse::decode(&*source.message(number)).unwrap()
}

async fn publish(messages: Vec<WatchResponse>, tenants: &[Sender<WatchResponse>]) {
    let mut orders = Orders::from_stdin();
    let mut due = messages.into_iter().zip(tenants.iter().cycle());
    while let Some(count) = orders.next().await {
        for (message, tenant) in due.by_ref().take(count) {
            tenant.send(message).unwrap();
        }
    }
}

struct Service {
    source: Source,
    tenants: Vec<Sender<WatchResponse>>,
}

#[tonic::async_trait]
impl Watch for Service {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let messages = self.tenants[self.source.tenant(request.get_ref())].subscribe();
        let stream = unfold(messages, async |mut messages: Receiver<WatchResponse>| match messages.recv().await {
            Ok(message) => Some((Ok(message), messages)),
            Err(error) => Some((Err(Status::data_loss(error.to_string())), messages)),
        });
        let mut response = Response::new(Box::pin(stream) as Self::WatchStream);
        response.metadata_mut().insert("snap-token", "none".parse().unwrap());
        Ok(response)
    }
}
