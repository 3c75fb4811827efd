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
    /// Draw number `draw` of the posterior, no dropout: the same weights for every batch.
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

    /// The draw that posterior sampling uses. Bit 62 marks predictive ones, so that they never share
    /// noise with training, whose draws stay consecutive (a buffer fills blocks of them). The bit
    /// above it stays free: [`fill_bartlett`](crate::dist::wishart::fill_bartlett) doubles its draw.
    ///
    /// # Errors
    /// If the pass's own index is 2^62 or more: it would be the address of another pass.
    pub fn posterior_draw(&self) -> candle_core::Result<Option<u64>> {
        const PREDICTIVE: u64 = 1 << 62;
        let (draw, mark) = match *self {
            Self::Mean => return Ok(None),
            Self::Train { draw } => (draw, 0),
            Self::Posterior { draw } => (draw, PREDICTIVE),
        };
        if draw >= PREDICTIVE {
            candle_core::bail!("expected a draw below 2^62, got {draw}")
        }
        Ok(Some(draw | mark))
    }
}
