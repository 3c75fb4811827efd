//! Pickled weights, which this crate does not open, because reading a pickle runs its author's code.

/// The file name endings of PyTorch's pickles, and of the indices of sharded pickles.
const ENDINGS: [&str; 7] = [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin.index.json"];

/// The name prefixes of files with these endings that are not pickled weights: the state that a trainer keeps
/// for its next run, and another format.
const OTHERS: [&str; 7] =
    ["training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "ggml"];

/// The name of the pickled weights among `names`, a model's files, if they are its only weights.
pub(super) fn only_weights<'a>(names: &'a [String]) -> Option<&'a str> {
    let is_pickle = |name: &&'a str| {
        ENDINGS.iter().any(|ending| name.ends_with(ending))
            && !OTHERS.iter().any(|start| name.starts_with(start))
    };
    // The weights of an adapter are not those of a model.
    let whole = |name: &String| name.ends_with(".safetensors") && !name.starts_with("adapter_");
    if names.iter().any(whole) {
        return None;
    }
    // Prefers the usual name, so that the error names a file that users recognise.
    let known = |name: &&str| (!name.starts_with("pytorch_model"), name.to_string());
    names.iter().map(String::as_str).filter(is_pickle).min_by_key(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Option<String> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        only_weights(&names).map(str::to_string)
    }

    #[test]
    fn pickles_are_weights_where_there_are_no_others_and_a_trainer_s_state_is_none() {
        let names = ["config.json", "a.pt", "pytorch_model-00001-of-00002.bin", "training_args.bin"];
        assert_eq!(found(&names).as_deref(), Some(names[2]));
        assert_eq!(found(&["pytorch_model.bin.index.json"]).as_deref(), Some("pytorch_model.bin.index.json"));
        assert_eq!(found(&["consolidated.00.pth", "w.ckpt"]).as_deref(), Some("consolidated.00.pth"));
        assert_eq!(found(&["training_args.bin", "optimizer.pt", "rng_state_0.pth", "config.json"]), None);
        assert_eq!(found(&["random_states_0.pkl", "ggml-model-f16.bin"]), None);
        assert_eq!(found(&["model.bin", "model-00001-of-00002.safetensors"]), None);
        assert_eq!(found(&["model.bin", "adapter_model.safetensors"]).as_deref(), Some("model.bin"));
    }
}
