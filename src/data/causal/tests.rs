//! Tests of encoding, packing and batching with a tokenizer of eleven words.

use candle_core::Device;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::Whitespace;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::Tokenizer;

use super::*;
use crate::data::instruct::Prompted;
use crate::error::Result;

/// `<s>` 0, `</s>` 1, `?` 2, then `a` 3 to `h` 10; a text begins with `<s>`.
fn tiny() -> Tokenizer {
    let words = ["<s>", "</s>", "?", "a", "b", "c", "d", "e", "f", "g", "h"];
    let vocab = words.iter().enumerate().map(|(id, word)| (word.to_string(), id as u32)).collect();
    let model = WordLevel::builder().vocab(vocab).unk_token("?".into()).build().unwrap();
    let template = TemplateProcessing::builder()
        .try_single("<s> $A")
        .unwrap()
        .special_tokens(vec![("<s>", 0)])
        .build()
        .unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Whitespace {})).with_post_processor(Some(template));
    tokenizer
}

fn row(prompt: &str, answer: &str) -> Prompted {
    Prompted { prompt: prompt.into(), answer: answer.into(), ..Prompted::default() }
}

fn encode(max_length: usize, learn_prompt: bool, rows: &[Prompted]) -> Encodings {
    PromptEncoder::new(tiny(), max_length, 64, Some(1), learn_prompt).unwrap().encode(rows).unwrap()
}

#[test]
fn the_answer_and_its_end_are_learnt_and_the_prompt_is_given() {
    let out = encode(10, false, &[row("a b", " c"), row("", "d e")]);
    assert_eq!(out.rows[0].ids, [0, 3, 4, 5, 1]);
    assert_eq!(out.rows[0].learnt, [false, false, false, true, true]);
    assert_eq!(out.rows[1].learnt, [false, true, true, true]);
    assert_eq!((out.cut, out.dropped, out.rows[1].targets()), (0, 0, 3));
    let all = encode(10, true, &[row("a b", " c")]);
    assert_eq!(all.rows[0].learnt, [false, true, true, true, true]);
    assert_eq!(PromptEncoder::new(tiny(), 10, 64, None, false).unwrap().prompt("a b").unwrap(), [0, 3, 4]);
}

#[test]
fn a_cut_is_counted_and_a_lost_answer_leaves_the_row_out() {
    let out =
        encode(4, false, &[row("a", " b"), row("a b", " c d"), row("a b c", " d"), row("a b c d e", " f")]);
    assert_eq!((out.rows.len(), out.cut, out.dropped), (2, 1, 2));
    assert_eq!((out.rows[1].ids.as_slice(), out.rows[1].row), (&[0, 3, 4, 5][..], 1));
    for bad in [1, 65] {
        let error = PromptEncoder::new(tiny(), bad, 64, None, false).unwrap_err().to_string();
        assert!(error.contains("max_length"), "{error}");
    }
}

#[test]
fn a_prompt_goes_on_where_a_tokenizer_would_end_it() -> Result<()> {
    let mut tokenizer = tiny();
    let ended = TemplateProcessing::builder()
        .try_single("<s> $A </s>")
        .unwrap()
        .special_tokens(vec![("<s>", 0), ("</s>", 1)])
        .build()
        .unwrap();
    tokenizer.with_post_processor(Some(ended));
    let encoder = PromptEncoder::new(tokenizer, 10, 64, Some(1), false)?;
    assert_eq!(encoder.prompt("a b")?, [0, 3, 4]);
    assert_eq!(encoder.encode(&[row("a", " b")])?.rows[0].ids, [0, 3, 4, 1]);
    Ok(())
}

#[test]
fn a_text_that_ends_with_any_end_token_gets_no_second_one() -> Result<()> {
    let mut tokenizer = tiny();
    tokenizer.add_special_tokens([tokenizers::AddedToken::from("</s>", true)]).unwrap();
    // Two tokens end a text: `</s>` and, as where a turn ends, `h`.
    let encoder = PromptEncoder::new(tokenizer, 10, 64, [1, 10], false)?;
    let rows =
        encoder.encode(&[row("a", " b"), row("a", " b h"), row("a", " b </s>"), row("a", " h b")])?.rows;
    let ids: Vec<_> = rows.iter().map(|row| row.ids.as_slice()).collect();
    assert_eq!(ids, [&[0, 3, 4, 1][..], &[0, 3, 4, 10], &[0, 3, 4, 1], &[0, 3, 10, 4, 1]]);
    assert!(rows.iter().all(|row| row.learnt.last() == Some(&true)));
    assert_eq!(encoder.of_answers().encode(&[row("a", " b")])?.rows[0].ids, [0, 3, 4]);
    Ok(())
}

#[test]
fn a_text_that_begins_with_the_tokenizers_first_token_gets_no_second_one() -> Result<()> {
    let mut tokenizer = tiny();
    tokenizer.add_special_tokens([tokenizers::AddedToken::from("<s>", true)]).unwrap();
    let encoder = PromptEncoder::new(tokenizer, 10, 64, Some(1), false)?;
    assert_eq!(encoder.prompt("<s> a b")?, [0, 3, 4]);
    assert_eq!((encoder.prompt("a b")?, encoder.prompt("")?), (vec![0, 3, 4], vec![0]));
    let rows = encoder.encode(&[row("<s> a", " b"), row("", "<s> a")])?.rows;
    assert_eq!((rows[0].ids.as_slice(), rows[1].ids.as_slice()), (&[0, 3, 4, 1][..], &[0, 3, 1][..]));
    assert_eq!((rows[0].targets(), rows[1].targets()), (2, 2));
    assert_eq!(encoder.length(&row("<s> a", " b"))?, 4);
    Ok(())
}

#[test]
fn a_long_text_becomes_pieces_and_each_of_its_tokens_is_learnt_once() -> Result<()> {
    let encode = |max_length| {
        PromptEncoder::new(tiny(), max_length, 20, Some(1), false)?.encode(&[row("", "a b c d e f g h")])
    };
    let whole = encode(10)?.rows.swap_remove(0).ids;
    assert_eq!(whole, [0, 3, 4, 5, 6, 7, 8, 9, 10, 1]);
    for (max_length, pieces) in [(4, 3), (3, 5), (9, 2), (10, 1), (2, 9)] {
        let encoded = encode(max_length)?;
        assert_eq!((encoded.rows.len(), encoded.cut, encoded.dropped), (pieces, 0, 0));
        let mut learnt = encoded.rows[0].ids[..1].to_vec();
        for tokens in &encoded.rows {
            assert!(tokens.ids.len() <= max_length && tokens.row == 0);
            assert_eq!(tokens.targets(), tokens.ids.len() - 1);
            assert_eq!(learnt.last(), tokens.ids.first());
            learnt.extend(&tokens.ids[1..]);
        }
        assert_eq!(learnt, whole);
    }
    Ok(())
}

#[test]
fn packing_fills_sequences_and_loses_nothing_but_first_tokens() {
    let rows = encode(10, false, &[row("a", " b"), row("c", " d"), row("e", " f"), row("g", " h")]).rows;
    let packed = pack(&rows, 9);
    assert_eq!(
        packed.iter().map(|p| (p.ids.len(), p.targets(), p.row)).collect::<Vec<_>>(),
        [(8, 4, 0), (8, 4, 2)]
    );
    assert_eq!(packed[0].ids, [0, 3, 4, 1, 0, 5, 6, 1]);
    assert_eq!(packed[0].learnt[4..], [false, false, true, true]);
    assert_eq!(pack(&rows, 3).len(), 4); // rows that are too long stay alone
}

#[test]
fn a_batch_points_at_the_places_before_its_targets() -> Result<()> {
    let rows = encode(10, false, &[row("a b", " c"), row("d", " e f g")]).rows;
    let batch = CausalBatch::collate(&rows.iter().collect::<Vec<_>>(), 1, &Device::Cpu)?;
    assert_eq!(batch.input_ids.to_vec2::<u32>()?, [[0, 3, 4, 5, 1, 1], [0, 6, 7, 8, 9, 1]]);
    assert_eq!(batch.attention_mask.to_vec2::<u8>()?, [[1, 1, 1, 1, 1, 0], [1; 6]]);
    assert_eq!(batch.positions.places(), [2, 3, 7, 8, 9, 10]);
    assert_eq!(batch.targets.to_vec1::<i64>()?, [5, 1, 7, 8, 9, 1]);
    assert_eq!(batch.counts, [2, 4]);
    assert!(CausalBatch::collate(&[], 0, &Device::Cpu).is_err());
    Ok(())
}
