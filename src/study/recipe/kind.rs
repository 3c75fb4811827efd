//! The names of recipes: the method that each trains, and what it does otherwise than the method alone.

use crate::train::MethodName;

/// What a recipe does otherwise than its method alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    Plain,
    RsLora,
    LoraPlus,
    /// IVON is the optimiser.
    Ivon,
    Calibrated,
    /// Draws are of the component with the largest weight alone.
    Sparse,
    /// The posterior is added to the trained method.
    PostHoc,
}

/// A name, and what it stands for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub name: &'static str,
    pub method: MethodName,
    pub variant: Variant,
}

/// All kinds, in the order in which an error lists them.
const KINDS: [Kind; 18] = [
    plain(MethodName::Full),
    plain(MethodName::Lora),
    plain(MethodName::Map),
    kind("rslora", MethodName::Lora, Variant::RsLora),
    kind("loraplus", MethodName::Lora, Variant::LoraPlus),
    plain(MethodName::LoraFa),
    kind("ivon", MethodName::Lora, Variant::Ivon),
    plain(MethodName::Dora),
    plain(MethodName::AdaLora),
    plain(MethodName::Ia3),
    plain(MethodName::Bottleneck),
    plain(MethodName::Prompt),
    plain(MethodName::Blob),
    plain(MethodName::MonteCLoRA),
    kind("monteclora-calibrated", MethodName::MonteCLoRA, Variant::Calibrated),
    kind("monteclora-sparse", MethodName::MonteCLoRA, Variant::Sparse),
    kind("monteclora-posthoc", MethodName::Lora, Variant::PostHoc),
    plain(MethodName::Released),
];

/// The names that a recipe can begin with.
pub const NAMES: [&str; 18] = {
    let (mut names, mut i) = ([""; 18], 0);
    while i < names.len() {
        names[i] = KINDS[i].name;
        i += 1;
    }
    names
};

const fn plain(method: MethodName) -> Kind {
    kind(method.as_str(), method, Variant::Plain)
}

const fn kind(name: &'static str, method: MethodName, variant: Variant) -> Kind {
    Kind { name, method, variant }
}

impl Kind {
    /// The kind of this name.
    pub fn of(name: &str) -> Option<Self> {
        KINDS.into_iter().find(|kind| kind.name == name)
    }

    /// Whether it trains MonteCLoRA's mixture, also as released or around a trained LoRA.
    pub fn has_mixture(self) -> bool {
        self.method.is_monteclora() || self.variant == Variant::PostHoc
    }
}
