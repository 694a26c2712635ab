// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a listener is told, and what it may call meanwhile.

use gmem::kernel::fake::{FakeKernel, VmKind};
use gmem::Attribute::{Private, Shared};
use gmem::{Attribute, Block, BlockConfig, Change, Listener, Vm};
use std::fs::File;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

const PAGE: u64 = gmem::PAGE_SIZE;
const SIZE: u64 = 8 * PAGE;

fn rig(kind: VmKind) -> (Arc<FakeKernel>, Arc<Vm>, Arc<Block>) {
    let kernel = Arc::new(FakeKernel::new(kind));
    let fd = File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let block = Block::new(&vm, &BlockConfig::confidential("ram", SIZE, Shared)).unwrap();
    block.bind(0, SIZE, 0).unwrap().keep();
    (kernel, vm, block)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Told {
    Begin(u64),
    Refused(u64),
    End(u64, bool),
}

/// Hears of runs by their first page, and refuses what begins at one.
#[derive(Default)]
struct Ears {
    refuses: Option<u64>,
    told: Mutex<Vec<(Told, u64)>>,
}

impl Ears {
    fn refusing(page: u64) -> Arc<Self> {
        Arc::new(Self {
            refuses: Some(page),
            ..Self::default()
        })
    }

    fn hear(&self, told: Told, change: &Change) {
        self.told.lock().unwrap().push((told, change.sequence));
    }

    fn told(&self) -> Vec<Told> {
        let told = self.told.lock().unwrap();
        let sequences: Vec<_> = told.iter().map(|&(_, sequence)| sequence).collect();
        assert!(sequences.windows(2).all(|two| two[0] == two[1]), "{told:?}");
        told.iter().map(|&(told, _)| told).collect()
    }
}

impl Listener for Ears {
    fn begin(&self, change: &Change) -> Result<(), i32> {
        let page = change.span.first() / PAGE;
        if self.refuses == Some(page) {
            self.hear(Told::Refused(page), change);
            return Err(libc::EPERM);
        }
        self.hear(Told::Begin(page), change);
        Ok(())
    }

    fn end(&self, change: &Change, changed: bool) {
        self.hear(Told::End(change.span.first() / PAGE, changed), change);
    }
}

/// Makes two runs of what is to become private.
fn part(vm: &Vm) {
    vm.convert(2 * PAGE, 2 * PAGE, Private).unwrap();
}

#[test]
fn all_runs_of_a_conversion_have_one_sequence_and_each_its_own_begin_and_end() {
    for kind in [VmKind::Confidential, VmKind::InPlace] {
        let (_, vm, block) = rig(kind);
        part(&vm);
        let ears = Arc::new(Ears::default());
        block.add_listener(ears.clone()).keep();
        vm.convert(0, SIZE, Private).unwrap();
        use Told::*;
        assert_eq!(
            ears.told(),
            [Begin(0), Begin(4), End(0, true), End(4, true)]
        );
    }
}

#[test]
fn who_refuses_a_run_hears_of_the_end_of_those_that_it_had_accepted() {
    for kind in [VmKind::Confidential, VmKind::InPlace] {
        let (_, vm, block) = rig(kind);
        part(&vm);
        let [first, last] = [(); 2].map(|()| Arc::new(Ears::default()));
        let refuses = Ears::refusing(4);
        block.add_listener(first.clone()).keep();
        block.add_listener(refuses.clone()).keep();
        block.add_listener(last.clone()).keep();
        let error = vm.convert(0, SIZE, Private).unwrap_err();
        assert_eq!(error.errno(), libc::EPERM);
        use Told::*;
        let heard = [Begin(0), Begin(4), End(4, false), End(0, false)];
        assert_eq!(first.told(), heard);
        assert_eq!(refuses.told(), [Begin(0), Refused(4), End(0, false)]);
        assert_eq!(last.told(), [Begin(0), End(0, false)]);
        assert_eq!(block.stats().bytes_private, 2 * PAGE);
    }
}

/// Calls what its contract allows.
struct Asks(Weak<Block>, Mutex<Vec<Attribute>>);

impl Asks {
    fn ask(&self, change: &Change) {
        let block = self.0.upgrade().unwrap();
        let (offset, size) = (change.span.first(), change.span.size_bytes());
        assert!(!block.host().is_null());
        block.file(Shared);
        block.file(Private);
        block.memslot(0).unwrap();
        block.max_order(offset).unwrap();
        block.stats();
        let (attribute, end) = block.run_at(offset).unwrap();
        assert!(end >= offset + size);
        assert_eq!(
            block.check_access(offset, size).is_ok(),
            attribute == Shared
        );
        self.1.lock().unwrap().push(attribute);
    }
}

impl Listener for Asks {
    fn begin(&self, change: &Change) -> Result<(), i32> {
        self.ask(change);
        Ok(())
    }

    fn end(&self, change: &Change, _: bool) {
        self.ask(change);
    }
}

#[test]
fn what_a_listener_may_call_waits_for_no_conversion() {
    for kind in [VmKind::Confidential, VmKind::InPlace] {
        let (_, vm, block) = rig(kind);
        let asks = Arc::new(Asks(Arc::downgrade(&block), Mutex::default()));
        block.add_listener(asks.clone()).keep();
        let (done, is_done) = channel();
        let thread = std::thread::spawn(move || {
            vm.convert(0, SIZE, Private).unwrap();
            vm.convert(0, SIZE, Shared).unwrap();
            block.reset().unwrap();
            done.send(()).unwrap();
        });
        is_done
            .recv_timeout(Duration::from_secs(60))
            .expect("it waits for itself");
        thread.join().unwrap();
        assert_eq!(*asks.1.lock().unwrap(), [Shared, Private, Private, Shared]);
    }
}
