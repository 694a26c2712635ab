// SPDX-License-Identifier: MIT OR Apache-2.0
//! What KVM thinks of each page, in debugfs.

use crate::guest::{Guest, Source, PAGES, ROM};
use crate::lab::Offered;
use crate::sys::Vm;
use crate::{name_of, PAGE, SNP, SW_PROTECTED, TDX};
use std::path::PathBuf;

fn file(vm: &Vm) -> PathBuf {
    // SAFETY: a number is returned.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    format!("/sys/kernel/debug/kvm/{thread}-{}/lab_tee", vm.fd()).into()
}

fn view(guest: &Guest) -> Vec<String> {
    let text = std::fs::read_to_string(file(&guest.vm)).unwrap();
    text.lines().map(str::to_string).collect()
}

pub fn kinds(guest: &Guest) -> Vec<String> {
    let mut lines = view(guest);
    lines.retain(|line| line.starts_with("kind "));
    lines
}

#[test]
fn the_kernel_says_what_it_thinks() {
    let Some(_offered) = Offered::new(name_of(the_kernel_says_what_it_thinks), 3) else {
        return;
    };
    for (kind, name) in [(SNP, "snp"), (TDX, "tdx")] {
        let guest = Guest::new(kind);
        let rom = "pages fffff 1 private plain";
        let created = [
            &format!("vm {name} created"),
            "pages 0 40 private plain",
            rom,
        ];
        assert_eq!(view(&guest), created);
        let mut page = Source::new(1);
        let vcpu = (kind == TDX).then(|| crate::tdx::start(&guest));
        if kind == SNP {
            crate::snp::start(&guest);
        }
        let mut add = |number: u64| match &vcpu {
            Some(vcpu) => crate::tdx::add(vcpu, number * PAGE, &mut page).unwrap(),
            None => crate::snp::add(&guest, number * PAGE, &mut page),
        };
        (2..6).for_each(&mut add);
        add(9);
        let started = [
            &format!("vm {name} started"),
            "pages 0 2 private plain",
            "pages 2 4 private launched",
            "pages 6 3 private plain",
            "pages 9 1 private launched",
            "pages a 36 private plain",
            rom,
        ];
        assert_eq!(view(&guest), started);
        // One that is shared is no launched one any more, nor is one that is given back.
        guest.convert(3, 1, false).unwrap();
        guest.gmem.punch(5, 1).unwrap();
        // Where the VM has the attribute it means nothing to an RMP.
        let stays = kind == SNP && !guest.in_place;
        let less = [
            "pages 0 2 private plain",
            "pages 2 1 private launched",
            match stays {
                true => "pages 3 1 shared launched",
                false => "pages 3 1 shared plain",
            },
            "pages 4 1 private launched",
            "pages 5 4 private plain",
        ];
        assert_eq!(view(&guest)[1..6], less);
        guest.convert(3, 1, true).unwrap();
        let back = match stays {
            true => ["pages 2 3 private launched", "pages 5 4 private plain"],
            false => ["pages 2 1 private launched", "pages 3 1 private plain"],
        };
        assert_eq!(view(&guest)[2..4], back);
        // To the end of a file, all of it, and one of a page.
        guest.convert(PAGES - 1, 1, false).unwrap();
        assert!(view(&guest).contains(&"pages 3f 1 shared plain".to_string()));
        guest.gmem.punch(0, PAGES).unwrap();
        guest.convert(0, PAGES, false).unwrap();
        guest.convert(ROM / PAGE, 1, false).unwrap();
        let shared = ["pages 0 40 shared plain", "pages fffff 1 shared plain"];
        assert_eq!(view(&guest)[1..], shared);
        match kind {
            SNP => crate::snp::finish(&guest).unwrap(),
            _ => crate::tdx::finish(&guest).unwrap(),
        }
        assert_eq!(view(&guest)[0], format!("vm {name} finished"));
        let place = file(&guest.vm);
        drop(vcpu);
        drop(guest);
        assert!(!place.exists());
    }
    assert!(!file(&Vm::new(SW_PROTECTED).unwrap()).exists());
}
