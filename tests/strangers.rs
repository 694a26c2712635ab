// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who changes other pages keeps no conversion waiting, however slow the kernel is with it.

use gmem::kernel::fake::{FakeKernel, VmKind};
use gmem::{Attribute, Binding, Block, BlockConfig, DmaSplit, Gpa, Vm, Window, WindowConfig};
use std::cell::Cell;
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const SIZE: u64 = 64 * PAGE;
/// Where the second half of the block is bound.
const HIGH: u64 = 1 << 30;
const IOVA: u64 = 1 << 32;

/// What a call of the conversion that is timed takes.
const CALL: Duration = Duration::from_millis(5);
/// A call that is stuck goes on after this: a test that fails ends, too.
const STUCK: Duration = Duration::from_secs(1);

thread_local! {
    static GETS_STUCK: Cell<bool> = const { Cell::new(false) };
}

/// Where calls are stuck.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    open: bool,
    stuck: usize,
    finished: usize,
}

impl Gate {
    fn call(&self) {
        let mut state = self.state.lock().unwrap();
        if !GETS_STUCK.get() || state.open {
            drop(state);
            std::thread::sleep(CALL);
            return;
        }
        state.stuck += 1;
        self.changed.notify_all();
        drop(self.changed.wait_timeout_while(state, STUCK, |s| !s.open));
    }

    fn change(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    /// Until so many are stuck, or past it; or until they had the time for it.
    fn wait_for(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let patience = STUCK / 4;
        let waits = |s: &mut GateState| s.stuck + s.finished < count;
        drop(self.changed.wait_timeout_while(state, patience, waits));
    }
}

struct Rig {
    gate: Arc<Gate>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    fd: File,
}

impl Rig {
    /// Two halves, each bound, with a private page in the upper one, and windows for either end of the
    /// lower one.
    fn new() -> Self {
        let gate = Arc::new(Gate::default());
        let hook = gate.clone();
        let kernel = FakeKernel::with_hook(VmKind::Confidential, move |_| hook.call());
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(Arc::new(kernel), &fd).unwrap();
        let config = BlockConfig {
            dma_split: DmaSplit::Page,
            release_delay: Duration::ZERO,
            ..BlockConfig::confidential("ram", SIZE, Shared)
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, SIZE / 2, 0).unwrap().keep();
        block.bind(SIZE / 2, SIZE / 2, HIGH).unwrap().keep();
        vm.convert(HIGH + 8 * PAGE, PAGE, Private).unwrap();
        let rig = Self {
            gate,
            vm,
            block,
            fd,
        };
        rig.show(0, 0).keep();
        rig.show(1, 28).keep();
        rig
    }

    fn config(&self, ioas_id: u32, page: u64, pages: u64) -> WindowConfig {
        WindowConfig {
            ioas_id,
            offset: page * PAGE,
            length: pages * PAGE,
            iova: IOVA + page * PAGE,
            readonly: false,
        }
    }

    fn show(&self, ioas_id: u32, page: u64) -> Window {
        let config = self.config(ioas_id, page, 4);
        self.block.add_window(&self.fd, &config).unwrap()
    }

    /// The time of a conversion to private and back.
    fn convert(&self) -> Duration {
        let start = Instant::now();
        self.vm.convert(30 * PAGE, PAGE, Private).unwrap();
        self.vm.convert(30 * PAGE, PAGE, Shared).unwrap();
        start.elapsed()
    }

    fn spawn<'scope>(
        &'scope self,
        scope: &'scope std::thread::Scope<'scope, '_>,
        gets_stuck: bool,
        act: impl FnOnce(&Self) + Send + 'scope,
    ) {
        scope.spawn(move || {
            GETS_STUCK.set(gets_stuck);
            act(self);
            self.gate.change(|state| state.finished += 1);
        });
    }
}

/// `act` changes pages 32 and up, beside a conversion of page 0 that is stuck in the kernel, and gets
/// stuck there itself, or not.
fn delays_nobody(what: &str, prepare: impl Fn(&Rig) -> Option<Window>, act: Act) {
    for gets_stuck in [false, true] {
        let rig = Rig::new();
        let window = prepare(&rig);
        let undisturbed = rig.convert();
        let disturbed = std::thread::scope(|scope| {
            rig.spawn(scope, true, |rig| rig.vm.convert(0, PAGE, Private).unwrap());
            rig.gate.wait_for(1);
            rig.spawn(scope, gets_stuck, move |rig| act(rig, window.as_ref()));
            rig.gate.wait_for(2);
            // Who waits for a stranger waits each time: another program of this machine may be one once.
            let disturbed = (0..4).map(|_| rig.convert()).min();
            rig.gate.change(|state| state.open = true);
            disturbed.expect("one of four")
        });
        assert!(
            disturbed <= 2 * undisturbed,
            "{what} of other pages, stuck: {gets_stuck}: a conversion took {disturbed:?} instead \
             of {undisturbed:?}"
        );
    }
}

type Act = fn(&Rig, Option<&Window>);

#[test]
fn a_bind_of_other_pages_delays_no_conversion() {
    let prepare = |rig: &Rig| {
        rig.block.unbind(SIZE / 2, SIZE / 2, HIGH).unwrap();
        None
    };
    delays_nobody("a bind", prepare, |rig, _| {
        rig.block.bind(SIZE / 2, SIZE / 2, HIGH).unwrap().keep();
    });
}

#[test]
fn an_unbind_of_other_pages_delays_no_conversion() {
    delays_nobody(
        "an unbind",
        |_| None,
        |rig, _| rig.block.unbind(SIZE / 2, SIZE / 2, HIGH).unwrap(),
    );
}

#[test]
fn a_window_of_other_pages_delays_no_conversion() {
    delays_nobody(
        "a new window",
        |_| None,
        |rig, _| {
            rig.show(2, 50).keep();
        },
    );
}

#[test]
fn the_end_of_a_window_of_other_pages_delays_no_conversion() {
    delays_nobody(
        "the end of a window",
        |rig| Some(rig.show(2, 50)),
        |_, window| window.unwrap().remove().unwrap(),
    );
}

#[test]
fn a_window_that_moves_over_other_pages_delays_no_conversion() {
    delays_nobody(
        "a reshape",
        |rig| Some(rig.show(2, 50)),
        |rig, window| {
            let config = rig.config(2, 52, 6);
            window.unwrap().reshape(&config).unwrap();
        },
    );
}

/// Bindings come and go while guests convert there: what KVM holds for private is what the block does
/// that is bound at last, and nothing where none is.
/// Page 30, which converts, is shown all the time.
#[test]
fn a_window_that_moves_around_pages_delays_no_conversion_of_them() {
    delays_nobody(
        "a window that moves",
        |rig| {
            let config = rig.config(2, 26, 8);
            Some(rig.block.add_window(&rig.fd, &config).unwrap())
        },
        |rig, window| {
            let config = rig.config(2, 28, 12);
            window.unwrap().reshape(&config).unwrap();
        },
    );
}

#[test]
fn what_is_bound_at_last_is_what_the_vm_knows() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let fd = File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    const PAGES: u64 = 8;
    let blocks = ["one", "other"].map(|name| {
        let config = BlockConfig::confidential(name, PAGES * PAGE, Shared);
        Block::new(&vm, &config).unwrap()
    });
    let rounds = 500;
    for round in 0..rounds {
        std::thread::scope(|scope| {
            // Either has half of the pages, or all of them: then one of the two is refused.
            let half = round % 2 * PAGES / 2 * PAGE;
            let binders = blocks.each_ref().map(|block| {
                scope.spawn(move || {
                    for _ in 0..4 {
                        if let Ok(binding) = block.bind(half, PAGES * PAGE - half, half) {
                            binding.unbind().unwrap();
                        }
                    }
                    let bound = block.bind(half, PAGES * PAGE - half, half);
                    bound.map(Binding::keep).is_ok()
                })
            });
            for page in 0..2 {
                let vm = &vm;
                scope.spawn(move || {
                    for turn in 0..16 {
                        let attribute = [Private, Shared][usize::from(turn % 3 == 2)];
                        let page = (page + turn * 3 + round) % PAGES;
                        // Where nothing is bound at the moment it is refused.
                        let _ = vm.convert(page * PAGE, PAGE, attribute);
                    }
                });
            }
            let bound = binders.map(|binder| binder.join().unwrap());
            assert_ne!(bound[0], bound[1], "one has the addresses, and only one");
        });
        for page in 0..PAGES {
            let offset = page * PAGE;
            let mut known = kernel.is_private(Gpa(offset));
            for block in &blocks {
                let bound = block.stats().bindings != 0 && offset >= round % 2 * PAGES / 2 * PAGE;
                known ^= bound && block.run_at(offset).unwrap().0 == Private;
            }
            assert!(
                !known,
                "round {round}: page {page} is something else for the VM"
            );
        }
        let half = round % 2 * PAGES / 2 * PAGE;
        for block in blocks.iter().filter(|block| block.stats().bindings != 0) {
            block.unbind(half, PAGES * PAGE - half, half).unwrap();
        }
        assert!((0..PAGES).all(|page| !kernel.is_private(Gpa(page * PAGE))));
    }
    assert_eq!(kernel.violations(), Vec::<String>::new());
}
