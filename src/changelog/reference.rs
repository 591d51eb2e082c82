//! The change log as a few vectors: the reference for the tests of the real log, and the storage of tests without a
//! disk.

use super::{Batch, ChangeLog, DiskSpace, Entry, Error, State, TransactionOutcome};
use crate::model::change::TenantId;
use crate::model::lsn::{CommitLsn, EndLsn, Lsn, Position, Xid8};
use crate::model::scope::{Place, Scope};
use crate::model::snap_token::TokenId;
use crate::model::transaction::{Gap, Header, Message, TenantMessage};
use std::sync::Mutex;

#[derive(Default)]
pub(crate) struct ModelLog {
    inner: Mutex<Inner>,
}

#[derive(Clone, Default)]
pub(crate) struct Inner {
    state: Option<State>,
    messages: Vec<(TenantId, Message)>,
    staged: Vec<(TenantId, Message)>,
    /// The transactions with changes, and their end LSNs.
    transactions: Vec<(Header, EndLsn)>,
    abandoned: Vec<Xid8>,
    tokens: Vec<(TokenId, EndLsn)>,
    gaps: Vec<Gap>,
}

impl Inner {
    pub(crate) fn state(&mut self) -> &mut State {
        self.state.get_or_insert_with(|| State {
            node_id: "model".into(),
            origin: None,
            tail: Lsn::ZERO,
            verified: None,
            mapping: None,
            watermark: Lsn::ZERO,
            open_gap: None,
        })
    }

    pub(crate) fn apply(&mut self, entry: &Entry) {
        match entry {
            Entry::Adopt(origin) => {
                self.state().tail = origin.lsn;
                self.state().watermark = origin.lsn;
                self.state().origin = Some(origin.clone());
            }
            Entry::Staged(staged) if staged.commit.0 < self.tail() => {}
            Entry::Staged(staged) => self.staged.extend(staged.messages.iter().cloned()),
            Entry::Discard => self.staged.clear(),
            Entry::Transaction(transaction) if transaction.end.0 <= self.tail() => self.staged.clear(),
            Entry::Transaction(transaction) => {
                self.messages.append(&mut self.staged);
                self.messages.extend(transaction.messages.iter().cloned());
                self.tokens.extend(transaction.token_ids.iter().map(|id| (*id, transaction.end)));
                self.gaps.extend(transaction.gaps.iter().cloned());
                self.transactions.extend(transaction.has_changes().then_some((transaction.header, transaction.end)));
                self.state().tail = transaction.end.0;
            }
            Entry::Progress(lsn) => self.state().tail = self.state().tail.max(*lsn),
            Entry::Gap(gap) => {
                self.state().tail = self.state().tail.max(gap.to.lsn);
                self.gaps.push(gap.clone());
            }
            Entry::Diverge { at, history } => {
                let gone: Vec<_> = self.transactions.extract_if(.., |(_, end)| end.0 > *at).collect();
                self.messages.retain(|(_, m)| !gone.iter().any(|(header, _)| header.commit == m.header.commit));
                self.abandoned.extend(gone.iter().map(|(header, _)| header.xid));
                self.tokens.retain(|(_, end)| end.0 <= *at);
                self.gaps = std::mem::take(&mut self.gaps).into_iter().filter_map(|gap| gap.up_to(*at)).collect();
                self.state().tail = self.state().tail.min(*at);
                self.state().watermark = self.state().watermark.min(*at);
                if let Some(verified) = &mut self.state().verified {
                    verified.at = verified.at.min(*at);
                }
                if let Some(origin) = &mut self.state().origin {
                    origin.history = history.clone();
                }
            }
            Entry::Verified(verified) => self.state().verified = Some(verified.clone()),
            Entry::Mapping(fingerprint) => self.state().mapping = Some(*fingerprint),
            Entry::Watermark(lsn) => self.state().watermark = (*lsn).min(self.tail()),
        }
        self.state().open_gap = Gap::last_open(&self.gaps).cloned();
    }

    pub(crate) fn tail(&self) -> Lsn {
        self.state.as_ref().map_or(Lsn::ZERO, |state| state.tail)
    }
}

impl ModelLog {
    pub(crate) fn of(inner: Inner) -> Self {
        Self { inner: Mutex::new(inner) }
    }
}

impl ChangeLog for ModelLog {
    fn state(&self) -> State {
        self.inner.lock().unwrap().state().clone()
    }

    fn append(&self, entries: &[Entry]) -> Result<(), Error> {
        let mut inner = self.inner.lock().unwrap();
        entries.iter().for_each(|entry| inner.apply(entry));
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        Ok(())
    }

    fn read(&self, scope: &Scope, after: &Place, up_to: &Place, bytes_max: usize) -> Result<Batch, Error> {
        let inner = self.inner.lock().unwrap();
        let up_to = up_to.clone().min_at(inner.tail());
        let here = inner.messages.iter().filter(|(tenant, m)| scope.includes(tenant) && m.is_before(up_to.of(tenant)));
        let rest = here.filter_map(|(tenant, m)| Some((tenant, m.clone().after(after.of(tenant))?)));
        let mut rest: Vec<_> = rest.collect();
        rest.sort_by_key(|(tenant, message)| (message.header.commit, *tenant, message.order()));
        let commits: Vec<_> = rest.iter().map(|(_, message)| message.header.commit).collect();
        let mut batch = Batch::default();
        let mut bytes = 0;
        for (n, (tenant, message)) in rest.into_iter().enumerate() {
            if bytes >= bytes_max {
                batch.more = true;
                break;
            }
            bytes += message.changes.len();
            let commit = message.header.commit;
            let end = inner.transactions.iter().find(|(header, _)| header.commit == commit).map(|(_, end)| *end);
            let is_last = *scope == Scope::All && commits.get(n + 1) != Some(&commit);
            let has_gap = |end| inner.gaps.iter().any(|gap| gap.to == Position::after(end));
            let ends_transaction = end.filter(|end| is_last && !has_gap(*end));
            batch.messages.push(TenantMessage { tenant: tenant.clone(), message, ends_transaction });
        }
        Ok(batch)
    }

    fn transactions_since(&self, from: Lsn) -> Result<Vec<(EndLsn, Xid8)>, Error> {
        let inner = self.inner.lock().unwrap();
        let since = inner.transactions.iter().filter(|(header, _)| header.commit.0 >= from);
        Ok(since.map(|(header, end)| (*end, header.xid)).collect())
    }

    fn horizon(&self, _: &Scope) -> Result<Position, Error> {
        Ok(self.state().origin.map_or(Position::ZERO, |origin| Position::at(origin.lsn)))
    }

    fn knows(&self, tenant: &TenantId) -> Result<bool, Error> {
        Ok(self.inner.lock().unwrap().messages.iter().any(|(t, _)| t == tenant))
    }

    fn find_token(&self, id: TokenId) -> Result<Option<EndLsn>, Error> {
        Ok(self.inner.lock().unwrap().tokens.iter().find(|(other, _)| *other == id).map(|(_, end)| *end))
    }

    fn find_transaction(&self, _: &Scope, xid: Xid8) -> Result<Option<TransactionOutcome>, Error> {
        let inner = self.inner.lock().unwrap();
        let found = inner.transactions.iter().find(|(header, _)| header.xid == xid);
        let found = found.map(|(header, end)| TransactionOutcome::Committed { commit: header.commit, end: *end });
        Ok(if inner.abandoned.contains(&xid) { Some(TransactionOutcome::Abandoned) } else { found })
    }

    fn transaction_before(&self, commit: CommitLsn) -> Result<Option<Xid8>, Error> {
        let inner = self.inner.lock().unwrap();
        Ok(inner.transactions.iter().rfind(|(header, _)| header.commit < commit).map(|(header, _)| header.xid))
    }

    fn largest_below(&self, xid: Xid8) -> Result<Option<(Xid8, CommitLsn)>, Error> {
        let inner = self.inner.lock().unwrap();
        let below = inner.transactions.iter().map(|(header, _)| (header.xid, header.commit));
        Ok(below.filter(|(other, _)| *other < xid).max())
    }

    fn gaps(&self) -> Vec<Gap> {
        self.inner.lock().unwrap().gaps.clone()
    }

    fn retain(&self, _: u64) -> Result<DiskSpace, Error> {
        Ok(DiskSpace::Enough)
    }
}
