//! Tests of whole models, adapters and files against independent implementations. They are one binary, since
//! each binary links all of candle.

#[cfg(unix)]
mod answers;
mod averages;
mod between_steps;
mod candle_transformers;
mod causal;
#[cfg(unix)]
mod chat;
mod checkpoint;
#[cfg(unix)]
mod command;
mod damaged;
mod decoders;
#[cfg(feature = "cuda")]
mod device;
#[cfg(unix)]
mod distributed;
mod encoders;
mod eval;
mod families;
mod finetune;
mod gguf;
mod gguf_settings;
mod gradients;
mod held_out;
mod inject;
#[cfg(unix)]
mod kill;
mod labels;
mod language;
#[cfg(feature = "cuda")]
mod launches;
mod linearised;
mod live_llama_cpp;
mod live_peft;
mod llama;
mod llama_golden;
mod merge;
mod named;
mod opened;
mod other_writers;
mod own_model;
mod peft_adapters;
mod placement;
mod prompt;
mod quantized;
mod random_weights;
mod resume;
mod save;
mod serving;
mod stories;
mod study;
mod support;
mod tables;
mod together;
mod transformers;
