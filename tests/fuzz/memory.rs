//! Counts the memory that each thread holds, and its peak.
//!
//! The counters are per thread: memory that is allocated on one thread and freed on another falsifies them,
//! but the readers under test allocate on their own thread only.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator with counters.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    /// The limit on `HELD`, and the reader's name and the input's index for the message.
    static END: Cell<(isize, &'static str, u64)> = const { Cell::new((isize::MAX, "", 0)) };
}

/// Adds `size` bytes to the count; returns false and adds nothing if that exceeds the limit.
fn take(size: usize) -> bool {
    let held = HELD.get().saturating_add_unsigned(size);
    let (end, name, index) = END.get();
    if held > end {
        // The message allocates, so the limit is lifted for it. The caller then aborts the process or handles
        // the failed allocation.
        END.set((isize::MAX, name, index));
        crate::say(&format!("fuzz {name}: input {index} asks for {size} bytes"));
        END.set((end, name, index));
        return false;
    }
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
    true
}

fn give(size: usize) {
    HELD.set(HELD.get().saturating_sub_unsigned(size));
}

// SAFETY: every call goes to the system's allocator with the same arguments, or returns null, which
// means that there is no memory. The counters have no destructor and allocate nothing.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if take(layout.size()) {
            System.alloc(layout)
        } else {
            std::ptr::null_mut()
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if take(layout.size()) {
            System.alloc_zeroed(layout)
        } else {
            std::ptr::null_mut()
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give(layout.size());
        System.dealloc(pointer, layout);
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both blocks exist while the bytes are copied.
        if !take(size) {
            return std::ptr::null_mut();
        }
        let moved = System.realloc(pointer, layout, size);
        give(if moved.is_null() { size } else { layout.size() });
        moved
    }
}

/// Runs `f`; returns its result, and the most bytes that it held at once beyond those held before. An
/// allocation that takes it beyond `end` bytes fails, with a message that names `input`.
pub fn peak<T>(input: (&'static str, u64), end: usize, f: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    PEAK.set(before);
    END.set((before.saturating_add_unsigned(end), input.0, input.1));
    let found = f();
    END.set((isize::MAX, "", 0));
    (found, usize::try_from(PEAK.get() - before).unwrap_or(0))
}

#[test]
fn the_most_that_was_held_is_counted() {
    let (_, peak) = peak(("", 0), usize::MAX, || {
        for size in [1000, 5000, 10] {
            drop(std::hint::black_box(vec![0u8; size]));
        }
    });
    assert_eq!(peak, 5000);
}

#[test]
fn what_goes_beyond_the_end_is_refused() {
    let (refused, _) = peak(("memory", 7), 1 << 20, || Vec::<u8>::new().try_reserve(1 << 30).is_err());
    assert!(refused);
}
