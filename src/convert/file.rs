// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest_memfd that is no block's, converted in place: a VMM may have small ones of its own, for firmware and
//! option ROMs.

use crate::attributes::Attribute;
use crate::error::{Doing, Error, Result};
use crate::plane::{Converting, Patience};
use crate::stats::BlockCounters;
use crate::units::{Offset, Span};
use crate::vm::Vm;
use std::os::fd::AsFd;

impl Vm {
    /// Has the kernel make `size` bytes at `offset` of a guest_memfd of this VM
    /// [`Attribute::Shared`] or [`Attribute::Private`] in place, for a file that is the VMM's own
    /// and no block's: where the kernel converts in place, only the file knows what is private. All
    /// of it or nothing. Pages that have the attribute already cost nothing. The file is one of
    /// single pages.
    ///
    /// The library keeps no books of it: devices are to have lost pages that become private before,
    /// and whoever has mapped the file finds no memory behind them afterwards. Takes no lock; two
    /// callers for the same pages are the VMM's matter. Waits for up to a tenth of a second while
    /// somebody holds a page.
    ///
    /// # Errors
    /// - EINVAL: the range is empty, not page aligned, wraps, or isn't in the file; or the VM's type
    ///   has no private memory.
    /// - ENOTSUP: the kernel doesn't convert in place.
    /// - EAGAIN: somebody holds a page that is to become private.
    /// - Another errno is the kernel's (KVM_SET_MEMORY_ATTRIBUTES2): ENOMEM, or ENOTTY if the file
    ///   is no guest_memfd.
    ///
    /// # Example
    /// ```
    /// # use gmem::kernel::fake::{FakeKernel, VmKind};
    /// # use gmem::kernel::Kernel;
    /// # use std::os::fd::AsFd;
    /// # fn main() -> gmem::Result<()> {
    /// # let file = std::fs::File::open("/dev/null").unwrap();
    /// # let kernel = std::sync::Arc::new(FakeKernel::new(VmKind::InPlace));
    /// # let vm = gmem::Vm::with_kernel(kernel.clone(), &file)?;
    /// # let firmware = kernel.create_guest_memfd(file.as_fd(), 1 << 20, 1, 0).unwrap();
    /// vm.convert_file(&firmware, 0xf0000, 0x1000, gmem::Attribute::Shared)?;
    /// # Ok(()) }
    /// ```
    pub fn convert_file(
        &self,
        guest_memfd: impl AsFd,
        offset: u64,
        size: u64,
        attribute: Attribute,
    ) -> Result<()> {
        let span = Span::new(Offset(offset), size).ok_or_else(|| {
            Error::invalid(format!(
                "{size:#x} bytes at offset {offset:#x} of a file {}",
                Span::<Offset>::flaw(offset, size)
            ))
        })?;
        let machine = self.machine();
        if !machine.probe().in_place_conversion {
            return Err(Error::unsupported(
                "this kernel does not convert pages of a guest_memfd in place",
            ));
        }
        let file = Converting {
            kernel: &**machine.kernel(),
            file: guest_memfd.as_fd(),
            huge_page: None,
        };
        let told = file.convert(
            span,
            attribute,
            &mut Patience::default(),
            &BlockCounters::default(),
        );
        let told = told
            .map_err(|halted| halted.stopped.call)
            .doing(|| format!("making {span} of a file {} in place", attribute.name()));
        told.map_err(|error| match error.errno() {
            libc::EAGAIN => {
                error.with_remedy("somebody holds a page: a device, a ring of io_uring, a debugger")
            }
            _ => error,
        })
    }
}
