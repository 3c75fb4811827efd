//! The ways to predict with a trained model, by the names that results, plans and reports give them.

/// The parameters as they are, or the posterior's mean: every method has it.
pub(super) const MEAN: &str = "mean";
/// [`MEAN`] at a temperature that is fitted on held-out rows.
pub(super) const TEMPERATURE: &str = "temperature";
/// TFB with the largest sigma that its loss tolerates.
pub(super) const TFB: &str = "tfb";
/// TFB with the sigma of the lowest NLL on held-out rows.
pub(super) const TFB_HELD_OUT: &str = "tfb held-out";
pub(super) const MC_DROPOUT: &str = "mc dropout";
/// The average over the last checkpoints of the training.
pub(super) const CHECKPOINTS: &str = "checkpoints";
pub(super) const LAST_LAYER_LAPLACE: &str = "last-layer laplace";
/// The Laplace approximation of the adapters.
pub(super) const LAPLACE: &str = "laplace";
/// MonteCLoRA's posterior, of the model that is linearised in A.
pub(super) const LINEARISED: &str = "linearised";
/// [`LINEARISED`] with the variances of the greatest evidence.
pub(super) const REFITTED: &str = "refitted";

const DRAWS: &str = " draws";

/// The average over so many posterior draws.
pub(super) fn draws(count: usize) -> String {
    format!("{count}{DRAWS}")
}

/// [`draws`] at a temperature that is fitted on held-out rows.
pub(super) fn tempered_draws(count: usize) -> String {
    format!("{}, {TEMPERATURE}", draws(count))
}

/// Whether a treatment is [`draws`].
pub(super) fn is_draws(treatment: &str) -> bool {
    treatment.ends_with(DRAWS)
}

/// Whether a treatment of a model without draws is fitted on held-out rows.
pub(super) fn is_fitted_held_out(treatment: &str) -> bool {
    [TEMPERATURE, TFB, TFB_HELD_OUT].contains(&treatment)
}
