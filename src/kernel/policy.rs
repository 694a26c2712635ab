// SPDX-License-Identifier: MIT OR Apache-2.0
//! From which NUMA nodes memory comes.

use libc::{c_int, c_ulong};
use std::fmt;

/// How nodes are chosen among.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyMode {
    /// The first of the given nodes while it has memory, then any (MPOL_PREFERRED).
    Preferred,
    /// The given nodes or none (MPOL_BIND).
    Bind,
    /// The given nodes in turn, page by page (MPOL_INTERLEAVE).
    Interleave,
}

/// A NUMA policy as mbind(2) and set_mempolicy(2) have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaPolicy {
    mode: PolicyMode,
    /// Bit n % 64 of word n / 64: node n.
    nodes: Vec<u64>,
}

impl NumaPolicy {
    /// A policy over the nodes whose bits are set: bit n % 64 of word n / 64 is node n. `None` if there
    /// is no node in it.
    pub fn new(mode: PolicyMode, nodes: &[u64]) -> Option<Self> {
        let nodes = nodes.to_vec();
        nodes
            .iter()
            .any(|&word| word != 0)
            .then_some(Self { mode, nodes })
    }

    pub(super) fn mode_number(&self) -> c_int {
        match self.mode {
            PolicyMode::Preferred => libc::MPOL_PREFERRED,
            PolicyMode::Bind => libc::MPOL_BIND,
            PolicyMode::Interleave => libc::MPOL_INTERLEAVE,
        }
    }

    pub(super) fn node_words(&self) -> &[u64] {
        &self.nodes
    }

    /// The kernel takes one bit less than it is told of (get_nodes).
    pub(super) fn max_node(&self) -> c_ulong {
        self.nodes.len() as c_ulong * 64 + 1
    }
}

impl fmt::Display for NumaPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has = |node: &usize| self.nodes[node / 64] >> (node % 64) & 1 != 0;
        let nodes: Vec<String> = (0..self.nodes.len() * 64)
            .filter(has)
            .map(|node| node.to_string())
            .collect();
        let mode = match self.mode {
            PolicyMode::Preferred => "preferred",
            PolicyMode::Bind => "bind",
            PolicyMode::Interleave => "interleave",
        };
        write!(f, "policy={mode} over NUMA nodes {}", nodes.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_the_bits_that_are_set() {
        let policy = NumaPolicy::new(PolicyMode::Bind, &[0b101, 1]).unwrap();
        assert_eq!(policy.to_string(), "policy=bind over NUMA nodes 0,2,64");
        assert!(NumaPolicy::new(PolicyMode::Interleave, &[0, 0]).is_none());
        assert!(NumaPolicy::new(PolicyMode::Preferred, &[]).is_none());
    }
}
