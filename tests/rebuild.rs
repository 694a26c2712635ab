// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM whose file is closed and made anew while its blocks, windows and listeners live on, on a
//! kernel that fails any call.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::{
    Attribute, Block, BlockConfig, Cause, Change, DmaSplit, Gpa, Listener, Span, Vm, Window,
    WindowConfig,
};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const SIZE: u64 = 16 * PAGE;
const IOVA: u64 = 1 << 32;

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    blocks: Vec<Arc<Block>>,
    windows: Vec<Window>,
    fd: File,
}

impl Rig {
    /// Two blocks of a VM of some kind, bound and shown one after the other.
    fn new(kind: VmKind, initial: Attribute) -> Self {
        let kernel = Arc::new(FakeKernel::new(kind));
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let mut rig = Self {
            kernel,
            vm,
            blocks: Vec::new(),
            windows: Vec::new(),
            fd,
        };
        for at in [0, SIZE] {
            let config = match kind {
                VmKind::Ordinary => BlockConfig::new("ram", SIZE),
                _ => BlockConfig {
                    dma_split: DmaSplit::Page,
                    release_delay: Duration::ZERO,
                    ..BlockConfig::confidential("ram", SIZE, initial)
                },
            };
            let block = Block::new(&rig.vm, &config).unwrap();
            rig.windows.push(rig.window(&block, at));
            rig.blocks.push(block);
        }
        rig.bind();
        rig
    }

    fn window(&self, block: &Arc<Block>, at: u64) -> Window {
        let config = WindowConfig {
            ioas_id: 0,
            offset: 0,
            length: SIZE,
            iova: IOVA + at,
            readonly: false,
        };
        block.add_window(&self.fd, &config).unwrap()
    }

    /// What the VMM does with a new VM.
    fn bind(&self) {
        for (number, block) in self.blocks.iter().enumerate() {
            let at = number as u64 * SIZE;
            let gpas = Span::new(Gpa(at), SIZE).unwrap();
            self.kernel.add_slot(gpas, block.file(Shared), 0);
            block.bind(0, SIZE, at).unwrap().keep();
        }
    }

    fn visible(&self) -> u64 {
        let blocks = self.blocks.iter();
        blocks.map(|block| block.stats().bytes_dma_mapped).sum()
    }

    /// Nothing of the old VM is left, and no device has anything.
    fn check_detached(&self) {
        assert_eq!(self.visible(), 0);
        assert_eq!(self.kernel.areas(0), 0);
        for block in &self.blocks {
            assert!(!self.kernel.is_guest_memfd(block.file(Private)));
            assert_eq!(block.stats().bindings, 0);
            let busy = libc::EBUSY;
            assert_eq!(block.memslot(0).unwrap_err().errno(), busy);
            assert_eq!(block.bind(0, SIZE, 0).unwrap_err().errno(), busy);
            assert_eq!(block.unbind(0, SIZE, 0).unwrap_err().errno(), libc::EINVAL);
            assert_eq!(block.preallocate(1).unwrap_err().errno(), busy);
            assert_eq!(block.check_access(0, 1).unwrap_err().errno(), busy);
            block.reset().unwrap();
            for page in 0..16 {
                assert!(!self.kernel.has_memory(block.file(Shared), page * PAGE));
            }
        }
        let error = self.vm.convert(0, PAGE, Shared).unwrap_err();
        assert!(matches!(error.cause(), Cause::Detached), "{error}");
        let error = Block::new(&self.vm, &BlockConfig::new("more", SIZE)).unwrap_err();
        assert!(matches!(error.cause(), Cause::Detached), "{error}");
    }

    /// All is as with a new VM.
    fn check_new(&self, initial: Attribute) {
        let bytes = match initial {
            Shared => 2 * SIZE,
            Private => 0,
        };
        assert_eq!(self.visible(), bytes);
        for (number, block) in self.blocks.iter().enumerate() {
            assert!(self.kernel.is_guest_memfd(block.file(Private)));
            let shown = self.kernel.mapped(block.host());
            assert_eq!(shown, Some(block.file(Shared).as_raw_fd()));
            assert_eq!(block.run_at(0).unwrap(), (initial, SIZE));
            let at = IOVA + number as u64 * SIZE;
            let seen = self.kernel.device_sees(0, block.file(Shared), at);
            assert_eq!(seen, (initial == Shared).then_some(0));
            assert_eq!(block.stats().bytes_quarantined, 0);
            block.check_access(0, 0).unwrap();
            assert_eq!(block.check_access(0, 1).is_ok(), initial == Shared);
        }
        assert_eq!(self.kernel.violations(), Vec::<String>::new());
    }
}

fn rigs() -> impl Iterator<Item = (Rig, Attribute)> {
    [
        (VmKind::Ordinary, Shared),
        (VmKind::Confidential, Shared),
        (VmKind::Confidential, Private),
    ]
    .into_iter()
    .map(|(kind, initial)| (Rig::new(kind, initial), initial))
}

fn is_confidential(rig: &Rig) -> bool {
    rig.vm.probe().private_attribute
}

#[test]
fn a_vm_is_rebuilt_under_its_blocks_as_often_as_one_likes() {
    for (rig, initial) in rigs() {
        let numbers: Vec<_> = rig
            .blocks
            .iter()
            .map(|b| (b.host(), b.file(Private).as_raw_fd()))
            .collect();
        for _ in 0..3 {
            if is_confidential(&rig) {
                rig.vm.convert(2 * PAGE, SIZE, Private).unwrap();
                rig.vm.convert(4 * PAGE, PAGE, Shared).unwrap();
            }
            rig.kernel.rebuild_vm();
            rig.vm.detach().unwrap();
            rig.check_detached();
            rig.vm.detach().unwrap();
            rig.vm.attach(&rig.fd).unwrap();
            rig.bind();
            rig.check_new(initial);
            let now: Vec<_> = rig
                .blocks
                .iter()
                .map(|b| (b.host(), b.file(Private).as_raw_fd()))
                .collect();
            assert_eq!(now, numbers, "what the VMM has in its hands is void");
        }
        let error = rig.vm.attach(&rig.fd).unwrap_err();
        assert!(matches!(error.cause(), Cause::Busy), "{error}");
    }
}

#[test]
fn a_detach_that_fails_leaves_the_vm_as_it_was() {
    let mut failed = 0;
    for first in 0.. {
        let mut done = 0;
        for (rig, initial) in rigs() {
            if is_confidential(&rig) {
                rig.vm.convert(PAGE, PAGE, Private).unwrap();
            }
            for at in [0, SIZE] {
                rig.kernel.remove_slot(Span::new(Gpa(at), SIZE).unwrap());
            }
            let snapshot = rig.kernel.snapshot();
            rig.kernel.fail(Some(Failures {
                first,
                count: 1,
                errno: libc::ENOMEM,
            }));
            let result = rig.vm.detach();
            let calls = rig.kernel.calls();
            rig.kernel.fail(None);
            if result.is_err() {
                failed += 1;
                assert_eq!(rig.kernel.snapshot(), snapshot, "call {first} of {calls:?}");
                for block in &rig.blocks {
                    assert!(rig.kernel.is_guest_memfd(block.file(Private)));
                    assert_eq!(block.stats().bindings, 1);
                    let shown = rig.kernel.mapped(block.host());
                    assert_eq!(shown, Some(block.file(Shared).as_raw_fd()));
                }
                if is_confidential(&rig) {
                    rig.vm.convert(0, 2 * SIZE, initial).unwrap();
                }
                rig.check_new(initial);
            }
            done += usize::from(calls.len() <= first);
            // And then it works, whatever failed: attaching makes up for what could not be closed.
            rig.kernel.rebuild_vm();
            rig.vm.detach().unwrap();
            rig.vm.attach(&rig.fd).unwrap();
            rig.bind();
            rig.check_new(initial);
        }
        if done == 3 {
            break;
        }
    }
    assert!(failed > 8, "{failed}");
}

#[test]
fn an_attach_that_fails_leaves_the_vm_detached() {
    let mut failed = 0;
    for first in 0.. {
        let mut done = 0;
        for (rig, initial) in rigs() {
            rig.kernel.rebuild_vm();
            rig.vm.detach().unwrap();
            rig.kernel.fail(Some(Failures {
                first,
                count: 1,
                errno: libc::ENOMEM,
            }));
            let result = rig.vm.attach(&rig.fd);
            let calls = rig.kernel.calls();
            rig.kernel.fail(None);
            if let Err(error) = result {
                failed += 1;
                assert_eq!(error.errno(), libc::ENOMEM, "{error}");
                rig.check_detached();
                rig.vm.attach(&rig.fd).unwrap();
            }
            done += usize::from(calls.len() <= first);
            rig.bind();
            rig.check_new(initial);
        }
        if done == 3 {
            break;
        }
    }
    assert!(failed > 30, "{failed}");
}

/// While there is no memory a VMM shows other memory at its addresses, lest who touches it dies.
#[test]
fn what_stands_in_for_lost_memory_goes_when_there_is_some_again() {
    for (rig, initial) in rigs() {
        rig.kernel.rebuild_vm();
        rig.vm.detach().unwrap();
        rig.kernel.fail(Some(Failures {
            first: 3,
            count: 1,
            errno: libc::EMFILE,
        }));
        rig.vm.attach(&rig.fd).unwrap_err();
        rig.kernel.fail(None);
        for block in &rig.blocks {
            // SAFETY: the block's addresses, to which there is no reference, and nothing beside them.
            let shown = unsafe {
                libc::mmap(
                    block.host().cast(),
                    SIZE as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                    -1,
                    0,
                )
            };
            assert_ne!(shown, libc::MAP_FAILED);
            // SAFETY: it can be written, and nobody else does.
            unsafe { block.host().write_volatile(0x55) };
        }
        rig.vm.attach(&rig.fd).unwrap();
        rig.bind();
        rig.check_new(initial);
        for block in &rig.blocks {
            // SAFETY: the block's memory, which only this thread uses.
            let found = unsafe { block.host().read_volatile() };
            assert_eq!(found, 0, "bytes of what stood in");
            // SAFETY: as above.
            unsafe { block.host().write_volatile(0xaa) };
            let mut byte = [0];
            let file = File::from(block.file(Shared).try_clone_to_owned().unwrap());
            file.read_exact_at(&mut byte, 0).unwrap();
            assert_eq!(byte, [0xaa], "the file has what is written at the address");
        }
    }
}

#[test]
fn blocks_and_windows_come_and_go_while_there_is_no_vm() {
    for (mut rig, initial) in rigs() {
        rig.kernel.rebuild_vm();
        rig.vm.detach().unwrap();
        let window = rig.windows.remove(0);
        window.remove().unwrap();
        let again = rig.window(&rig.blocks[0], 0);
        assert_eq!(again.mapped(), (0, 0));
        drop(rig.blocks.pop());
        drop(rig.windows.pop());
        rig.vm.attach(&rig.fd).unwrap();
        assert_eq!(again.mapped().0, if initial == Shared { SIZE } else { 0 });
        rig.bind();
        rig.vm.detach().unwrap();
        // And the VM itself.
    }
}

#[test]
fn a_vm_of_another_kind_is_refused() {
    let (rig, _) = rigs().next().unwrap();
    rig.kernel.rebuild_vm();
    rig.vm.detach().unwrap();
    rig.kernel.set_kind(VmKind::Confidential);
    let error = rig.vm.attach(&rig.fd).unwrap_err();
    assert!(matches!(error.cause(), Cause::Unsupported), "{error}");
    rig.check_detached();
    rig.kernel.set_kind(VmKind::Ordinary);
    rig.vm.attach(&rig.fd).unwrap();
}

#[derive(Default)]
struct Ears(Mutex<Vec<(Span<gmem::Offset>, Attribute, bool)>>);

impl Listener for Ears {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        Ok(())
    }
    fn end(&self, change: &Change, changed: bool) {
        let heard = (change.span, change.attribute, changed);
        self.0.lock().unwrap().push(heard);
    }
}

#[test]
fn listeners_hear_of_pages_that_are_as_at_first_again() {
    let (rig, _) = rigs().nth(1).unwrap();
    rig.vm.convert(PAGE, PAGE, Private).unwrap();
    rig.vm.convert(5 * PAGE, PAGE, Private).unwrap();
    let ears = Arc::new(Ears::default());
    rig.blocks[0].add_listener(ears.clone()).keep();
    rig.kernel.rebuild_vm();
    rig.vm.detach().unwrap();
    let page = |page| Span::new(gmem::Offset(page * PAGE), PAGE).unwrap();
    let expected = [(page(1), Shared, true), (page(5), Shared, true)];
    assert_eq!(*ears.0.lock().unwrap(), expected);
}

/// A listener that lets nothing happen, as far as it can.
struct Refuses;

impl Listener for Refuses {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        Err(libc::EBUSY)
    }
    fn end(&self, change: &Change, _: bool) {
        panic!("it has refused {change:?}");
    }
}

/// It can't keep the VM from its end, and so nobody is told that all is as before.
#[test]
fn who_refuses_a_rebuild_keeps_nobody_from_hearing_of_it() {
    let (rig, _) = rigs().nth(1).unwrap();
    rig.vm.convert(PAGE, PAGE, Private).unwrap();
    let ears = [Arc::new(Ears::default()), Arc::new(Ears::default())];
    rig.blocks[0].add_listener(ears[0].clone()).keep();
    rig.blocks[0].add_listener(Arc::new(Refuses)).keep();
    rig.blocks[0].add_listener(ears[1].clone()).keep();
    rig.kernel.rebuild_vm();
    rig.vm.detach().unwrap();
    let page = Span::new(gmem::Offset(PAGE), PAGE).unwrap();
    for ears in ears {
        assert_eq!(*ears.0.lock().unwrap(), [(page, Shared, true)]);
    }
}

/// Conversions of another thread meet the rebuild at any moment: they are done, or get an error.
#[test]
fn conversions_that_meet_a_rebuild_get_an_error_and_no_harm_is_done() {
    let (rig, initial) = rigs().nth(1).unwrap();
    // Its slots go once and for all.
    rig.kernel.rebuild_vm();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (vm, stop) = (&rig.vm, &stop);
        let converting = scope.spawn(move || {
            let mut refused = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for attribute in [Private, Shared] {
                    match vm.convert(PAGE, SIZE, attribute) {
                        Ok(()) => {}
                        // Between attach and bind the addresses are no memory.
                        Err(error) => {
                            refused += 1;
                            assert!([libc::EBUSY, libc::EINVAL].contains(&error.errno()));
                        }
                    }
                }
            }
            refused
        });
        for _ in 0..200 {
            vm.detach().unwrap();
            rig.kernel.rebuild_vm();
            rig.vm.attach(&rig.fd).unwrap();
            for (number, block) in rig.blocks.iter().enumerate() {
                block.bind(0, SIZE, number as u64 * SIZE).unwrap().keep();
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(converting.join().unwrap() > 0);
    });
    rig.vm.convert(0, 2 * SIZE, initial).unwrap();
    rig.check_new(initial);
}

/// Who asks before each access never meets an address without memory, whatever call fails.
#[test]
fn no_access_is_allowed_while_memory_is_hidden() {
    type Seen = Arc<OnceLock<(Arc<FakeKernel>, Arc<Block>)>>;
    for kind in [VmKind::Ordinary, VmKind::InPlace] {
        for first in 0.. {
            let seen = Seen::default();
            let hidden = Arc::new(Mutex::new(0));
            let (looks, counts) = (seen.clone(), hidden.clone());
            let kernel = Arc::new(FakeKernel::with_hook(kind, move |call| {
                let Some((kernel, block)) = looks.get() else {
                    return;
                };
                if kernel.mapped(block.host()).is_none() {
                    *counts.lock().unwrap() += 1;
                    let allowed = block.check_access(0, PAGE);
                    let errno = allowed.map_err(|error| error.errno());
                    assert_eq!(errno, Err(libc::EBUSY), "{kind:?}, {first}, at {call}");
                }
            }));
            let fd = File::open("/dev/null").unwrap();
            let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
            let config = match kind {
                VmKind::Ordinary => BlockConfig::new("ram", SIZE),
                _ => BlockConfig::confidential("ram", SIZE, Shared),
            };
            let block = Block::new(&vm, &config).unwrap();
            block.bind(0, SIZE, 0).unwrap().keep();
            if let VmKind::InPlace = kind {
                vm.convert(PAGE, PAGE, Private).unwrap();
            }
            let _ = seen.set((kernel.clone(), block.clone()));
            let fail = |count| {
                kernel.fail(Some(Failures {
                    first,
                    count,
                    errno: libc::ENOMEM,
                }));
            };
            fail(1);
            let detached = vm.detach();
            let calls = kernel.calls().len();
            kernel.fail(None);
            if detached.is_err() {
                block.check_access(0, PAGE).unwrap();
                vm.detach().unwrap();
            }
            assert_ne!(*hidden.lock().unwrap(), 0);
            kernel.rebuild_vm();
            fail(1);
            let attached = vm.attach(&fd);
            let calls = calls.max(kernel.calls().len());
            kernel.fail(None);
            if attached.is_err() {
                vm.attach(&fd).unwrap();
            }
            block.check_access(0, SIZE).unwrap();
            if first > calls {
                break;
            }
        }
    }
}

/// Where nothing could be mapped again, who asks first touches nothing.
#[test]
fn memory_that_could_not_be_shown_again_is_not_to_be_touched() {
    let (rig, _) = rigs().next().unwrap();
    let count = std::sync::atomic::AtomicUsize::new(0);
    // The first block is hidden; the second isn't, and the first can't be shown again.
    rig.kernel.fail_if(move |call| {
        let number = (call == "mmap(MAP_FIXED)")
            .then(|| count.fetch_add(1, std::sync::atomic::Ordering::SeqCst));
        number
            .is_some_and(|number| [1, 2].contains(&number))
            .then_some(libc::ENOMEM)
    });
    let error = rig.vm.detach().unwrap_err();
    rig.kernel.fail(None);
    assert_eq!(error.errno(), libc::ENOMEM);
    let [hidden, shown] = [0, 1].map(|number| &rig.blocks[number]);
    assert!(error.to_string().contains(hidden.name()), "{error}");
    assert_eq!(rig.kernel.mapped(hidden.host()), None);
    let refused = hidden.check_access(0, PAGE).unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY, "{refused}");
    let refused = hidden.place(0, b"firmware").unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY, "{refused}");
    shown.check_access(0, PAGE).unwrap();
    // The next rebuild cures it.
    rig.kernel.rebuild_vm();
    rig.vm.detach().unwrap();
    rig.vm.attach(&rig.fd).unwrap();
    rig.bind();
    rig.check_new(Shared);
}
