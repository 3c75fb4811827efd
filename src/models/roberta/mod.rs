//! RoBERTa (Liu et al. 2019), BERT (Devlin et al. 2019) and ELECTRA (Clark et al. 2020), with one encoder.
//!
//! They differ in the prefix of their tensor names, in how positions are counted, in token types, in the
//! width of the embeddings, and in the head on the first token. Checkpoints load with or without the
//! `roberta.`, `bert.` or `electra.` prefix.
//!
//! Adapters on a RoBERTa or BERT checkpoint, from a folder or a hub repository:
//!
//! ```rust
//! use candle_core::{DType, Device};
//! use monteclora::inject::{self, Targets};
//! use monteclora::models::{hub::ModelFiles, roberta::*};
//! use monteclora::{MonteCLoRAConfig, Noise, Params, Regularizer, Role};
//!
//! # if !std::path::Path::new("examples/assets").exists() { return Ok::<(), monteclora::Error>(()) } // not in the package
//! let (device, noise) = (Device::Cpu, Noise::new(42));
//! let files = ModelFiles::locate("examples/assets/tiny-roberta", None)?; // or "FacebookAI/roberta-base"
//! let config = RobertaConfig::from_file(files.config_path())?.with_num_labels(2);
//! let frozen = files.var_builder(DType::F32, &device)?; // memory-mapped, never differentiated
//! let params = Params::new(noise, &device);
//! let head = params.var_builder(Some(frozen.clone()), Role::Head); // the task's head is trained too
//! let mut model = RobertaForSequenceClassification::load(frozen, head, &config, noise)?;
//!
//! let method = MonteCLoRAConfig { rank: 8, alpha: 16.0, ..Default::default() };
//! inject::monteclora(&mut model, &Targets::parse("query,key,value")?, &method, &params)?;
//! let regularizer = Regularizer::new(&method); // regularizer.for_model(&model, pass)?.total joins the loss
//! println!("{} trainable parameters", params.trainable_count());
//! # assert!(params.trainable_count() > 0);
//! # Ok::<(), monteclora::Error>(())
//! ```

mod classification;
mod config;
mod encoder;
mod masked_lm;

pub use classification::RobertaForSequenceClassification;
pub use config::{Family, RobertaConfig};
pub use encoder::RobertaEncoder;
pub use masked_lm::RobertaForMaskedLM;
