// SPDX-License-Identifier: MIT OR Apache-2.0
//! What several threads do at once, in any order.

use gmem_schedules::kernel::fake::{FakeKernel, VmKind};
use gmem_schedules::{Attribute, Block, BlockConfig, Vm};
use std::sync::Arc;

const PAGE: u64 = 4096;

#[test]
fn conversions_of_the_same_pages_follow_one_another() {
    let all = || {
        let kernel = Arc::new(FakeKernel::with_hook(VmKind::Confidential, |_| {
            shuttle::hint::spin_loop()
        }));
        let vm = Vm::with_kernel(kernel.clone(), 0).unwrap();
        let config = BlockConfig::confidential("ram", 8 * PAGE, Attribute::Shared);
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, 8 * PAGE, 0).unwrap();
        let requests = [
            (0, 4, Attribute::Private),
            (2, 4, Attribute::Private),
            (1, 2, Attribute::Shared),
        ];
        let threads = requests.map(|(first, pages, attribute)| {
            let vm = vm.clone();
            shuttle::thread::spawn(move || {
                vm.convert(first * PAGE, pages * PAGE, attribute).unwrap()
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        for page in 0..8 {
            let private = block.run_at(page * PAGE).unwrap().0 == Attribute::Private;
            assert_eq!(private, kernel.is_private(gmem_schedules::Gpa(page * PAGE)));
        }
    };
    shuttle::check_random(all, 1000);
}
