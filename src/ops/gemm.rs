//! A safe interface to the `gemm` crate: matrices are slices with strides, checked before the call.
#![allow(unsafe_code)] // gemm takes raw pointers

use gemm::Parallelism;

/// A matrix to read: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A dense row-major matrix.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows are `row_stride` elements apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(),
            "matrix out of bounds"
        );
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// Whether a product overwrites its destination or is added to it, and on which threads.
#[derive(Clone, Copy)]
pub(super) enum Into {
    /// Overwrite it, on rayon's threads.
    Set,
    /// Add to it, on rayon's threads.
    Add,
    /// Overwrite it on this thread, for calls inside a parallel task.
    SetHere,
    /// Add to it on this thread.
    AddHere,
}

/// `dst = scale lhs rhs` or `dst += scale lhs rhs`; `dst` is row-major and dense.
///
/// The sums run over the inner dimension in blocks that do not depend on the number of threads.
pub(super) fn gemm(dst: &mut [f32], mode: Into, scale: f32, lhs: Mat, rhs: Mat) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!(k, rhs.rows, "inner dimensions");
    assert_eq!(dst.len(), m * n, "destination");
    if m == 0 || n == 0 {
        return;
    }
    let (add, parallelism) = match mode {
        Into::Set => (false, Parallelism::Rayon(0)),
        Into::Add => (true, Parallelism::Rayon(0)),
        Into::SetHere => (false, Parallelism::None),
        Into::AddHere => (true, Parallelism::None),
    };
    // SAFETY: `Mat`'s constructors checked that every element of lhs and rhs lies in its slice, the
    // assertion above that dst holds m x n; dst is borrowed mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            n as isize,
            add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
