//! Benchmarks of language models: by likelihood, by generated text, and by running generated programs.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use monteclora::data::causal::PromptEncoder;
use monteclora::data::instruct::{self, Choices, Format, ProgramTests, Prompted};
use monteclora::eval::sandbox::{Limits, Outcome as Ended, Sandbox};
use monteclora::eval::{chosen_by_name, code, score_choices, Benchmark, CodeAnswer, Generator, Normalize};
use monteclora::metrics::softmax;
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::DecoderForCausalLM;
use monteclora::models::generate::{generate, GenerateConfig, PosteriorWeights, Sampling};
use monteclora::train::distributed::Communicator;
use monteclora::{Error, Pass};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use crate::support::decoders::{frozen, prompted, toy_config};
use crate::support::{scatter, skipped, Outcome};

/// A model whose tokens are letters.
fn model() -> Outcome<DecoderForCausalLM> {
    let (model, params) = frozen(&toy_config(false)?, DType::F32)?;
    scatter(&params)?;
    Ok(model)
}

pub fn encoder(max_length: usize) -> Outcome<PromptEncoder> {
    // The end token has no part in the scores.
    Ok(PromptEncoder::new(letters()?, max_length, 40, Some(2), false)?)
}

pub fn question(prompt: &str, answers: &[&str], correct: usize) -> Prompted {
    let answers: Vec<String> = answers.iter().map(ToString::to_string).collect();
    let (answer, names) = (answers[correct].clone(), answers.clone());
    Prompted {
        prompt: prompt.into(),
        answer,
        choices: Some(Choices { names, answers, correct }),
        ..Prompted::default()
    }
}

fn generator<'a>(model: &'a DecoderForCausalLM, encoder: &'a PromptEncoder) -> Generator<'a> {
    let config = GenerateConfig { max_new_tokens: 6, ..GenerateConfig::default() };
    Generator { model, encoder, config, batch_size: 2 }
}

/// A tokenizer of single letters: `a` is 3, `b` is 4, and so on.
fn letters() -> Outcome<Tokenizer> {
    let vocab: Vec<(String, u32)> =
        ('a'..='z').zip(3..).map(|(letter, id)| (letter.to_string(), id)).chain([("?".into(), 0)]).collect();
    let model = WordLevel::builder().vocab(vocab.into_iter().collect()).unk_token("?".into()).build();
    let model = model.map_err(|e| e.to_string())?;
    let mut tokenizer = Tokenizer::new(model);
    let isolated = Split::new(SplitPattern::Regex(".".into()), SplitDelimiterBehavior::Isolated, false);
    let isolated = isolated.map_err(|e| e.to_string())?;
    tokenizer.with_pre_tokenizer(Some(isolated));
    Ok(tokenizer)
}

/// The log-probability of an answer after a prompt, both of single letters, by the logits of the whole text.
fn likelihood(model: &DecoderForCausalLM, prompt: &str, answer: &str) -> Outcome<f64> {
    let ids: Vec<u32> = format!("{prompt}{answer}").bytes().map(|c| u32::from(c - b'a') + 3).collect();
    let mask = Tensor::ones((1, ids.len()), DType::U8, &Device::Cpu)?;
    let ids_row = Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
    let logits = model.logits(&ids_row, &mask, &Pass::Mean.into())?;
    let logs = candle_nn::ops::log_softmax(&logits.squeeze(0)?, 1)?.to_vec2::<f32>()?;
    Ok((prompt.len()..ids.len()).map(|i| f64::from(logs[i - 1][ids[i] as usize])).sum())
}

/// Prompts and answers of very different lengths, computed together, behind virtual tokens or not. In the
/// last question, the longest prompt and the longest answer together would not fit into the model.
#[test]
fn a_prompt_that_is_computed_once_for_all_answers_gives_each_its_own_likelihood() -> Outcome {
    let long = "thequickbrownfoxjumpsoverthe";
    let rows = [
        question("abc", &["de", "f", "ghij"], 2),
        question(long, &["lazy", "dog"], 0),
        question("q", &["a", "b"], 1),
        question("abcdefg", &["h"], 0),
        question("same", &["xxxy", "xxxz", "xxxxx"], 1),
    ];
    let too_long = question("xy", &["quickbrownfoxjumpsover", "a"], 0);
    for virtual_tokens in [0, 3] {
        let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
        prompted(&mut model, virtual_tokens, DType::F32)?;
        scatter(&params)?;
        let rows = [&rows[..], std::slice::from_ref(&too_long)].concat();
        for batch_size in [1, 2, 6, 64] {
            let scores =
                score_choices(&model, &encoder(35)?, &rows, batch_size, Normalize::No, &[Pass::Mean])?;
            for (row, got) in rows.iter().zip(&scores.probabilities) {
                let answers = &row.choices.as_ref().ok_or("choices")?.answers;
                let by_hand = answers.iter().map(|answer| likelihood(&model, &row.prompt, answer));
                let expected = softmax(&by_hand.collect::<Outcome<Vec<f64>>>()?);
                let apart = expected.iter().zip(got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(apart < 1e-5, "{virtual_tokens}, {batch_size}: {row:?} {expected:?} {got:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn choices_are_scored_by_the_likelihood_of_their_answers() -> Outcome {
    let model = model()?;
    let rows = [question("abc", &["de", "f", "ghij"], 2), question("xy", &["a", "bcd"], 0)];
    // The score of an answer does not depend on whether training learns the prompts.
    let encoders = [encoder(20)?, PromptEncoder::new(letters()?, 20, 40, Some(2), true)?];
    for (normalize, batch_size) in
        [(Normalize::No, 1), (Normalize::Tokens, 2), (Normalize::Characters, 3), (Normalize::Bytes, 64)]
    {
        let passes = [Pass::Mean, Pass::Mean];
        let scores = score_choices(&model, &encoders[0], &rows, batch_size, normalize, &passes)?;
        assert_eq!(scores.correct, [2, 0]);
        let learnt = score_choices(&model, &encoders[1], &rows, batch_size, normalize, &passes)?;
        assert_eq!(learnt.probabilities, scores.probabilities);
        for (row, got) in rows.iter().zip(&scores.probabilities) {
            let answers = &row.choices.as_ref().ok_or("choices")?.answers;
            let by_hand = answers.iter().map(|answer| {
                // One letter is one token and one byte.
                let length = if normalize == Normalize::No { 1.0 } else { answer.len() as f64 };
                Ok(likelihood(&model, &row.prompt, answer)? / length)
            });
            let mut expected = softmax(&by_hand.collect::<Outcome<Vec<f64>>>()?);
            expected.resize(3, 0.0);
            assert!(expected.iter().zip(got).all(|(a, b)| (a - b).abs() < 1e-5), "{expected:?} {got:?}");
        }
        assert!(scores.evaluate()?.accuracy.is_some());
    }
    let fails = |rows: &[Prompted], max_length, passes: &[Pass]| -> Outcome<String> {
        let scores = score_choices(&model, &self::encoder(max_length)?, rows, 4, Normalize::No, passes);
        Ok(scores.expect_err("an error").to_string())
    };
    let message = fails(&rows, 6, &[Pass::Mean])?;
    assert!(
        message.contains("max_length: row 1 has 7 tokens with its answer 3, expected at most 6"),
        "{message}"
    );
    let silent = [rows[1].clone(), question("abc", &["de", ""], 0)];
    let message = fails(&silent, 20, &[Pass::Mean])?;
    assert!(message.contains("data: row 2: its answer 2 has no token"), "{message}");
    assert!(fails(&rows, 20, &[])?.contains("passes"));
    let plain = [Prompted { choices: None, ..rows[0].clone() }];
    assert!(fails(&plain, 20, &[Pass::Mean])?.contains("row 1 has no choices"));
    let names = ["answer1".to_string(), "answer2".to_string()];
    assert_eq!(chosen_by_name("the correct answer is answer2, not answer1", &names), Some(1));
    assert_eq!(chosen_by_name("who knows", &names), None);
    Ok(())
}

#[test]
fn a_text_goes_on_to_its_stop_whatever_the_batches() -> Outcome {
    let (model, encoder) = (model()?, encoder(20)?);
    let mut generator = generator(&model, &encoder);
    for sampling in [Sampling::ArgMax, Sampling::All { temperature: 1.5 }] {
        generator.config.sampling = sampling;
        let prompts = ["abc", "d", "efghi"];
        let whole = generator.texts(&prompts, &[])?;
        for (row, (prompt, text)) in prompts.iter().zip(&whole).enumerate() {
            let config = GenerateConfig { first_row: row as u64, ..generator.config.clone() };
            let ids = generate(&model, &[encoder.prompt(prompt)?], &config, &mut |_, _| true)?.swap_remove(0);
            let decoded = encoder.tokenizer().decode(&ids, true).map_err(|e| e.to_string())?;
            assert_eq!(text.trim(), decoded, "{prompt}");
        }
        generator.batch_size = 3;
        assert_eq!(generator.texts(&prompts, &[])?, whole);
        generator.batch_size = 2;
        // The last word of a text as a stop: it ends all texts that contain it.
        let last = |(row, text): (usize, &String)| Some((row, text.split_whitespace().last()?.to_string()));
        let (row, stop) = whole.iter().enumerate().find_map(last).ok_or("nothing but empty texts")?;
        let short = generator.texts(&prompts, &["never said", &stop])?;
        for (short, whole) in short.iter().zip(&whole) {
            assert_eq!(short, whole.split(&stop).next().unwrap_or_default());
        }
        assert!(short[row].len() < whole[row].len());
    }
    let long = "a".repeat(40);
    let error = generator.texts(&["a", "b", &long], &[]).expect_err("no room").to_string();
    assert!(error.contains("the prompt of row 3 has 40 tokens"), "{error}");
    // `check` reports this before anything is trained.
    let row =
        |prompt: &str| Prompted { prompt: prompt.into(), answer: "#### 1".into(), ..Prompted::default() };
    let error = Benchmark::Gsm8k.check(&generator, &[row("a"), row(&long)]).expect_err("no room").to_string();
    assert!(error.contains("the prompt of row 2 has 40 tokens"), "{error}");
    Benchmark::Gsm8k.check(&generator, &[row("a")])?;
    Ok(())
}

#[test]
fn benchmarks_score_what_the_model_says() -> Outcome {
    let (model, encoder) = (model()?, encoder(20)?);
    let generator = generator(&model, &encoder);
    let texts = generator.texts(&["abc", "xy"], &[])?;
    let said = |text: &str| text.split_whitespace().next().map(str::to_string).ok_or("nothing said");
    // The first row is right, the second gives the wrong name, the third gives none.
    let rows = [
        question("abc", &[&said(&texts[0])?, "!"], 0),
        question("xy", &["!", &said(&texts[1])?], 0),
        question("abc", &["!", "!!"], 0),
    ];
    let by_name = Benchmark::ChoiceByName.run(&generator, &rows)?;
    assert_eq!((by_name["accuracy"], by_name["answered"]), (1.0 / 3.0, 2.0 / 3.0));
    let rows = [question("abc", &["de", "f"], 1), question("xy", &["a", "bcd"], 0)];
    let expected = score_choices(&model, &encoder, &rows, 2, Normalize::Bytes, &[Pass::Mean])?.evaluate()?;
    let scores = Benchmark::Choice(Normalize::Bytes).run(&generator, &rows)?;
    assert_eq!((Some(scores["accuracy"]), Some(scores["nll"])), (expected.accuracy, expected.nll));
    let averaged = GenerateConfig { weights: PosteriorWeights::Average(2), ..generator.config.clone() };
    let averaged = Generator { config: averaged, ..generator };
    // Without an adapter every draw equals the mean.
    let again = Benchmark::Choice(Normalize::Bytes).run(&averaged, &rows)?;
    assert!((again["nll"] - scores["nll"]).abs() < 1e-12);

    let answered = Prompted { prompt: "abc".into(), answer: "#### 5".into(), ..Prompted::default() };
    let figures = Benchmark::Gsm8k.run(&generator, std::slice::from_ref(&answered))?;
    assert_eq!((figures["strict_match"], figures["flexible_extract"]), (0.0, 0.0));
    let fails = |benchmark: &Benchmark, row: Prompted| {
        benchmark.run(&generator, &[answered.clone(), row]).expect_err("an error").to_string()
    };
    let unmarked = Prompted { answer: "5".into(), ..answered.clone() };
    assert!(fails(&Benchmark::Gsm8k, unmarked).contains("the answer of row 2 has no \"#### \""));
    assert!(fails(&Benchmark::ChoiceByName, answered.clone()).contains("row 1 has no choices"));
    assert!(Benchmark::Gsm8k.run(&generator, &[]).expect_err("no row").to_string().contains("no row"));
    Ok(())
}

/// One of several processes that run one after the other: it hears what those before it said.
#[derive(Debug)]
struct OneOf<'a> {
    rank: usize,
    said: &'a RefCell<Vec<Vec<u8>>>,
}

impl Communicator for OneOf<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.said.borrow().len()
    }

    fn all_reduce_sum(&self, flat: &Tensor) -> monteclora::Result<Tensor> {
        Ok(flat.clone())
    }

    fn broadcast(&self, bytes: Vec<u8>, root: usize) -> monteclora::Result<Vec<u8>> {
        let mut said = self.said.borrow_mut();
        if root == self.rank {
            said[root] = bytes;
        }
        Ok(said[root].clone())
    }

    fn barrier(&self) -> monteclora::Result<()> {
        Ok(())
    }
}

/// Measures in parts of `size` rows in two processes, the second one first.
fn divided(
    benchmark: &Benchmark,
    generator: &Generator,
    rows: &[Prompted],
    size: usize,
) -> monteclora::Result<BTreeMap<String, f64>> {
    let config = generator.config.clone();
    let generator = Generator { batch_size: size, config, ..*generator };
    let said = RefCell::new(vec![Vec::new(); 2]);
    let run = |rank| benchmark.run_in_turns(&generator, rows, &OneOf { rank, said: &said });
    assert!(matches!(run(1), Err(Error::Distributed { rank: 0, .. }))); // it said nothing yet
    run(0)
}

#[test]
fn figures_are_those_of_all_rows_whoever_measures_which() -> Outcome {
    let (model, encoder) = (model()?, encoder(20)?);
    let mut generator = generator(&model, &encoder);
    generator.config.sampling = Sampling::All { temperature: 1.0 };
    generator.batch_size = 5;
    let names: &[&str] = &["c", "h", "m", "r", "w"];
    let rows = [("abc", 0), ("xy", 1), ("b", 2), ("abc", 3), ("zzz", 4)];
    let rows = rows.map(|(prompt, correct)| question(prompt, names, correct));
    for benchmark in [Benchmark::Choice(Normalize::Bytes), Benchmark::ChoiceByName] {
        let whole = benchmark.run(&generator, &rows)?;
        assert!(
            (0.0..1.0).contains(&whole["accuracy"]) && whole.values().any(|figure| *figure > 0.0),
            "{whole:?}"
        );
        for size in [1, 2, 3] {
            for (name, got) in divided(&benchmark, &generator, &rows, size)? {
                assert!((got - whole[&name]).abs() < 1e-6, "{size}: {name} {got}, not {}", whole[&name]);
            }
        }
    }
    let gsm8k = rows.map(|row| Prompted { answer: "#### 5".into(), ..row });
    assert_eq!(divided(&Benchmark::Gsm8k, &generator, &gsm8k, 2)?, Benchmark::Gsm8k.run(&generator, &gsm8k)?);
    // A result that lacks the figures of some row is refused: the second process measures the last two rows.
    let choice = Benchmark::Choice(Normalize::No);
    generator.batch_size = 3;
    for wrong in [vec![], vec![2.0, 0.0, 1.0], vec![0.0; 2]] {
        let words =
            std::iter::once(wrong.len() as u64).chain(wrong.iter().map(|number: &f64| number.to_bits()));
        let told = std::iter::once(0).chain(words.flat_map(u64::to_le_bytes)).collect();
        let said = RefCell::new(vec![Vec::new(), told]);
        let first = OneOf { rank: 0, said: &said };
        let error = choice.run_in_turns(&generator, &gsm8k, &first).expect_err("a fault");
        assert!(error.to_string().contains("invalid share"), "{error}");
    }
    Ok(())
}

#[test]
fn generated_programs_are_run_and_counted() -> Outcome {
    let sandbox = match Sandbox::new("python3", Limits::default()) {
        Ok(sandbox) => sandbox,
        Err(error) => {
            skipped(&error.to_string());
            return Ok(());
        }
    };
    let (model, encoder) = (model()?, encoder(20)?);
    let mut generator = generator(&model, &encoder);
    let tests =
        || ProgramTests { entry_point: "f".into(), test: "f = 1\ndef check(f):\n    assert f == 1".into() };
    // Letters after a hash are a comment; elsewhere they are an undefined name.
    let row = |prompt: &str| Prompted { prompt: prompt.into(), tests: Some(tests()), ..Prompted::default() };
    let rows = [row("#a"), row("abc")];
    let code = |samples, ks: &[usize]| Benchmark::Code {
        samples,
        ks: ks.to_vec(),
        answer: CodeAnswer::default(),
        sandbox: sandbox.clone(),
    };
    assert_eq!(code(1, &[1]).run(&generator, &rows)?["pass@1"], 0.5);
    let fails = |generator: &Generator, samples, ks: &[usize]| -> Result<String, Error> {
        Ok(code(samples, ks).run(generator, &rows).expect_err("an error").to_string())
    };
    assert!(fails(&generator, 2, &[1])?.contains("invalid samples: 2 greedy completions"));
    assert!(fails(&generator, 2, &[3])?.contains("expected k in 1 to 2, got 3"));
    generator.config.sampling = Sampling::All { temperature: 1.0 };
    let figures = code(3, &[1, 3]).run(&generator, &rows)?;
    assert_eq!((figures["pass@1"], figures["pass@3"]), (0.5, 0.5));
    assert_eq!(divided(&code(3, &[1, 3]), &generator, &rows, 1)?, figures);
    let error = code(1, &[1]).run(&generator, &[Prompted { tests: None, ..row("#") }]).expect_err("no tests");
    assert!(error.to_string().contains("row 1 has no tests"), "{error}");
    Ok(())
}

/// The rows of HumanEval, if the data lie beside the crate.
fn human_eval() -> Option<Vec<Prompted>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = |up: &Path| up.join("shared/data/humaneval/HumanEval.jsonl.gz");
    let path = here.ancestors().skip(1).map(place).find(|path| path.is_file())?;
    let output = Command::new("gunzip").arg("-c").arg(&path).output().ok()?;
    instruct::read_from(output.stdout.as_slice(), &path, Format::Code).ok()
}

#[test]
fn humaneval_s_own_solutions_pass_and_empty_ones_do_not() -> Outcome {
    let (Some(rows), Ok(sandbox)) = (human_eval(), Sandbox::new("python3", Limits::default())) else {
        skipped("no HumanEval beside the crate, or programs cannot be limited here");
        return Ok(());
    };
    assert_eq!(rows.len(), 164);
    // A slow machine may need more than 3 s for one of them.
    let sandbox = Sandbox::new("python3", Limits { seconds: 20, ..Limits::default() }).unwrap_or(sandbox);
    for row in &rows {
        let tests = row.tests.as_ref().expect("tests");
        let ends = |completion: &str| sandbox.run(&code::program(&row.prompt, completion, tests));
        assert_eq!(ends(&row.answer)?, Ended::Passed, "{}", row.prompt);
        assert_ne!(ends("    pass\n")?, Ended::Passed, "{}", row.prompt);
    }
    Ok(())
}
