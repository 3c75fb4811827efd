//! Which weights a forward pass uses.

/// Which weights a forward pass uses. The caller owns the draw index and increments it for every micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// The posterior mean without dropout, for deterministic prediction.
    Mean,
    /// A fresh draw with dropout, for training.
    Train {
        /// The index of the draw; the same index gives the same noise.
        draw: u64,
    },
    /// Draw number `draw` of the posterior without dropout: the same weights for every batch. Draws `2k` and
    /// `2k+1` are a pair with opposite perturbations ([`Self::sign`]).
    Posterior {
        /// The index of the draw.
        draw: u64,
    },
}

impl Pass {
    /// The index of the draw that dropout uses, in [`Self::Train`] only.
    pub fn dropout_draw(&self) -> Option<u64> {
        match self {
            Self::Train { draw } => Some(*draw),
            Self::Mean | Self::Posterior { .. } => None,
        }
    }

    /// The sign of the perturbation. Predictive draws come in pairs (0 and 1, 2 and 3, ..) that differ only
    /// in it. Each draw alone is distributed as the posterior, a Gaussian around its mean; terms that are
    /// linear in the perturbation cancel in the average of a pair (antithetic variates: Hammersley and Morton
    /// 1956).
    pub fn sign(&self) -> f64 {
        match self {
            Self::Posterior { draw } if draw % 2 == 1 => -1.0,
            _ => 1.0,
        }
    }

    /// The index of the draw that posterior sampling uses, `None` at the mean. A predictive pair shares the
    /// even index. Predictive indices have bit 62 set, so that they never share noise with training, whose
    /// draws stay consecutive (a buffer fills blocks of them). Bit 63 stays free:
    /// [`fill_bartlett`](crate::dist::wishart::fill_bartlett) doubles its draw.
    ///
    /// # Errors
    /// If the pass's own index is 2^62 or more: it would collide with the index of another pass.
    pub fn posterior_draw(&self) -> candle_core::Result<Option<u64>> {
        match *self {
            Self::Mean => Ok(None),
            Self::Train { draw } => own_index(draw).map(Some),
            Self::Posterior { draw } => Self::predictive(draw).map(|(index, _)| Some(index)),
        }
    }

    /// [`Self::posterior_draw`] and [`Self::sign`] of draw number `draw` of [`Self::Posterior`].
    ///
    /// # Errors
    /// As [`Self::posterior_draw`].
    pub(crate) fn predictive(draw: u64) -> candle_core::Result<(u64, f64)> {
        Ok((own_index(draw & !1)? | PREDICTIVE, Self::Posterior { draw }.sign()))
    }
}

/// The bit that is set in the indices of predictive draws.
const PREDICTIVE: u64 = 1 << 62;

/// Checks that a pass's own index leaves that bit free.
fn own_index(draw: u64) -> candle_core::Result<u64> {
    if draw >= PREDICTIVE {
        candle_core::bail!("expected a draw below 2^62, got {draw}")
    }
    Ok(draw)
}
