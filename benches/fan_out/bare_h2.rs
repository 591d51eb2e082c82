//! The smallest possible server on h2: one thread, and one loop for each connection.
//!
//! The messages of a tenant lie one behind the other, with gRPC's prefixes, before the first is published. A stream is
//! a position in these bytes. To send, it hands h2 a slice, as large as the client's windows permit. There are no
//! tokens, no deadlines, no limits and no pings, and clients are assumed to stay.

use super::{Orders, PREFIX_BYTES, Source, announce, request};
use bytes::{BufMut as _, Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};
use tuplewatch::api::grpc::proto::WatchRequest;

/// The largest DATA frame.
const JOIN_BYTES: usize = 16 << 10;

struct Tenant {
    /// All messages of the tenant, which have equal lengths.
    bytes: Bytes,
    message_bytes: usize,
    /// The number of published bytes.
    published: Cell<usize>,
    /// The streams, each as a connection and its number there.
    followers: RefCell<Vec<(Rc<Due>, usize)>>,
}

/// The streams of a connection that have something to send.
struct Due {
    streams: RefCell<Vec<usize>>,
    connection: RefCell<Waker>,
}

struct Server {
    source: Source,
    tenants: Vec<Tenant>,
}

pub(super) fn serve(source: Source) {
    let tenants = (0..source.tenants).map(|tenant| Tenant::new(&source, tenant)).collect();
    let server = Rc::new(Server { source, tenants });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(LocalSet::new().run_until(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        announce(listener.local_addr().unwrap());
        let connections = server.clone();
        spawn_local(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                spawn_local(connections.clone().connection(stream));
            }
        });
        server.publish().await;
    }));
}

impl Tenant {
    fn new(source: &Source, tenant: usize) -> Self {
        let mut bytes = BytesMut::new();
        for number in (tenant as u64..source.messages).step_by(source.tenants) {
            bytes.put_u8(0);
            bytes.put_u32(source.sample.len() as u32);
            bytes.extend_from_slice(&source.message(number));
        }
        Self {
            bytes: bytes.freeze(),
            message_bytes: PREFIX_BYTES + source.sample.len(),
            published: Cell::new(0),
            followers: RefCell::default(),
        }
    }

    fn publish(&self) {
        self.published.update(|published| published + self.message_bytes);
    }

    /// Wakes the streams, which send the published bytes.
    fn wake(&self) {
        for (due, stream) in &*self.followers.borrow() {
            let mut streams = due.streams.borrow_mut();
            if streams.is_empty() {
                due.connection.borrow().wake_by_ref();
            }
            streams.push(*stream);
        }
    }
}

impl Server {
    async fn publish(&self) {
        let (mut orders, mut tenants) = (Orders::from_stdin(), self.tenants.iter().cycle());
        while let Some(count) = orders.next().await {
            let due: Vec<&Tenant> = tenants.by_ref().take(count).collect();
            due.iter().for_each(|tenant| tenant.publish());
            // Each connection once.
            due.iter().take(self.tenants.len()).for_each(|tenant| tenant.wake());
        }
    }

    async fn connection(self: Rc<Self>, stream: TcpStream) {
        stream.set_nodelay(true).unwrap();
        let mut h2 = h2::server::handshake(stream).await.unwrap();
        let due = Rc::new(Due { streams: RefCell::default(), connection: RefCell::new(Waker::noop().clone()) });
        let mut requests: Vec<(RecvStream, SendResponse<Bytes>)> = Vec::new();
        let (mut streams, mut unsent): (Vec<Following>, Vec<usize>) = (Vec::new(), Vec::new());
        poll_fn(|cx| {
            due.connection.borrow_mut().clone_from(cx.waker());
            loop {
                requests.retain_mut(|(body, reply)| match poll_request(body, cx) {
                    Poll::Ready(tenant) => {
                        let tenant = self.source.tenant(&tenant);
                        self.tenants[tenant].followers.borrow_mut().push((due.clone(), streams.len()));
                        streams.push(Following::start(&self.tenants[tenant], tenant, reply));
                        false
                    }
                    Poll::Pending => true,
                });
                // A stream whose window is full is tried again.
                unsent.append(&mut due.streams.borrow_mut());
                unsent.retain(|stream| {
                    let following = &mut streams[*stream];
                    following.poll_sent(&self.tenants[following.tenant], cx).is_pending()
                });
                // Writes the sent frames, and reads.
                match h2.poll_accept(cx) {
                    Poll::Ready(Some(Ok((request, reply)))) => requests.push((request.into_body(), reply)),
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
    }
}

fn poll_request(body: &mut RecvStream, cx: &mut Context<'_>) -> Poll<WatchRequest> {
    body.poll_data(cx).map(|data| {
        let data = data.expect("a request").unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        request(&data)
    })
}

struct Following {
    tenant: usize,
    send: SendStream<Bytes>,
    /// The number of the tenant's bytes that h2 has taken.
    sent: usize,
}

impl Following {
    fn start(of: &Tenant, tenant: usize, reply: &mut SendResponse<Bytes>) -> Self {
        let response =
            http::Response::builder().header("content-type", "application/grpc").header("snap-token", "none");
        let send = reply.send_response(response.body(()).unwrap(), false).unwrap();
        Self { tenant, send, sent: of.published.get() }
    }

    /// Ready when h2 has taken all published bytes.
    fn poll_sent(&mut self, tenant: &Tenant, cx: &mut Context<'_>) -> Poll<()> {
        while self.sent < tenant.published.get() {
            let wanted = (tenant.published.get() - self.sent).min(JOIN_BYTES);
            self.send.reserve_capacity(wanted);
            let room = self.send.capacity().min(wanted);
            if room == 0 {
                match self.send.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(_))) => continue,
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
            let data = tenant.bytes.slice(self.sent..self.sent + room);
            self.sent += room;
            if self.send.send_data(data, false).is_err() {
                return Poll::Ready(());
            }
        }
        Poll::Ready(())
    }
}
