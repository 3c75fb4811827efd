//! Which weights a forward pass uses.

/// Which weights a forward pass uses. The caller owns the draw index: one per micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// The posterior mean, no dropout: deterministic prediction.
    Mean,
    /// A fresh draw, dropout active: training.
    Train {
        /// The index of the draw; the same index is the same noise.
        draw: u64,
    },
    /// Draw number `draw` of the posterior, no dropout: the same weights for every batch. Draws 2 k and 2 k + 1 are a
    /// pair of opposite perturbations ([`Self::sign`]).
    Posterior {
        /// The index of the draw.
        draw: u64,
    },
}

impl Pass {
    /// The draw that dropout uses: only training drops.
    pub fn dropout_draw(&self) -> Option<u64> {
        match self {
            Self::Train { draw } => Some(*draw),
            Self::Mean | Self::Posterior { .. } => None,
        }
    }

    /// The sign of the perturbation. Predictive draws come in pairs, 0 and 1, 2 and 3, that are alike but for it: each
    /// alone is distributed as the posterior, a Gaussian around its mean, and what is linear in the perturbation
    /// is gone from the average of a pair (antithetic variates: Hammersley and Morton 1956).
    pub fn sign(&self) -> f64 {
        match self {
            Self::Posterior { draw } if draw % 2 == 1 => -1.0,
            _ => 1.0,
        }
    }

    /// The draw that posterior sampling uses, of a predictive pair the even one. Bit 62 marks predictive ones, so that they
    /// never share noise with training, whose draws stay consecutive (a buffer fills blocks of them). The bit above it stays
    /// free: [`fill_bartlett`](crate::dist::wishart::fill_bartlett) doubles its draw.
    ///
    /// # Errors
    /// If the pass's own index is 2^62 or more: it would be the address of another pass.
    pub fn posterior_draw(&self) -> candle_core::Result<Option<u64>> {
        const PREDICTIVE: u64 = 1 << 62;
        let (draw, mark) = match *self {
            Self::Mean => return Ok(None),
            Self::Train { draw } => (draw, 0),
            Self::Posterior { draw } => (draw & !1, PREDICTIVE),
        };
        if draw >= PREDICTIVE {
            candle_core::bail!("expected a draw below 2^62, got {draw}")
        }
        Ok(Some(draw | mark))
    }
}
