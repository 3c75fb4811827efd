//! Fuzzes the readers of data in text files: TSV and other tables, JSON lines, instructions, conversations.

use std::path::Path;

use monteclora::data::chat::{self, ChatTemplate};
use monteclora::data::table::{self, Columns, Target};
use monteclora::data::task::Task;
use monteclora::data::{glue, instruct, superglue};
use serde_json::{json, Value};

use super::json::Documents;
use super::mutate::{bytes, Rng};
use super::reader::{Input, Reader};

fn reader(name: &'static str, file: &str) -> Reader {
    Reader { name, cost: 1, fixed: 64 << 10, times: 32, names: file.to_string() }
}

#[test]
fn glue_tables() {
    let seeds = [
        (Task::Cola, "gj04\t0\t*\tOne \"two.\ngj04\t1\t\tThree caf\u{e9}s.\n"),
        (Task::Sst2, "sentence\tlabel\nfun . \t1\nno fun\t0\n"),
        (Task::Mrpc, "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t\"a\tb\r\n"),
        (Task::Rte, "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n\n"),
        (Task::Qnli, "index\tquestion\tsentence\tlabel\n0\tq\ts\tentailment"),
        (Task::Mnli, "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction"),
        (Task::Stsb, "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.750\n1\tc\td\t0"),
        (
            Task::Qqp,
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tbroken\n1\t2\t3\ta\tb\t1\n",
        ),
    ];
    let path = Path::new("x.tsv");
    let texts: Vec<Vec<u8>> = seeds.iter().map(|(_, text)| text.as_bytes().to_vec()).collect();
    for (task, text) in seeds {
        glue::read_from(task, text.as_bytes(), path).unwrap();
    }
    let tokens = [
        "\t", "\n", "\r\n", "\u{feff}", "\"", "\u{0}", "1", "-1", "nan", "1e9", "label", "\t\t\t\t", "a\tb\n",
    ];
    let make = |rng: &mut Rng| {
        let kind = rng.below(seeds.len());
        // Mostly the task's own table.
        let from = if rng.once_in(8) { &texts[..] } else { std::slice::from_ref(&texts[kind]) };
        Input::one(kind, bytes(rng, from, &tokens))
    };
    let read = |input: &Input| glue::read_from(seeds[input.kind].0, &input.files[0][..], path).map(drop);
    reader("glue", "x.tsv").run(make, read);
}

#[test]
fn tables() {
    let seeds = [
        ("x.csv", "id,text,label\n1,\"a, \"\"b\"\"\",x\n2,\"two\nlines\",y\n"),
        ("x.csv", "text;label\na;1\nb;2.5\n"),
        ("x.tsv", "text\tlabel\r\n\"a\tx\r\nb\ty\r\n"),
        ("x.jsonl", "{\"text\": \"a\", \"label\": true}\n{\"text\": \"b\", \"label\": false}\n"),
        ("x.json", "[{\"text\": \"a\", \"label\": 0}, {\"text\": \"b\", \"label\": 1}]"),
    ];
    let texts: Vec<Vec<u8>> = seeds.iter().map(|(_, text)| text.as_bytes().to_vec()).collect();
    let columns = Columns::default();
    let open = |name: &str, bytes: &[u8]| {
        let table = table::read_from(bytes, Path::new(name), &columns)?;
        Target::infer(&table, None)?.examples(&table).map(drop)
    };
    for (name, text) in seeds {
        open(name, text.as_bytes()).unwrap();
    }
    let tokens = [
        "\"", "\"\"", ",", ";", "\t", "\n", "\r\n", "\u{feff}", "\u{0}", "nan", "1e9", "[", "{", "label",
        ",,,,", "null",
    ];
    let make = |rng: &mut Rng| {
        let kind = rng.below(seeds.len());
        let from = if rng.once_in(8) { &texts[..] } else { std::slice::from_ref(&texts[kind]) };
        Input::one(kind, bytes(rng, from, &tokens))
    };
    let read = |input: &Input| open(seeds[input.kind].0, &input.files[0][..]);
    // Rows of two characters, which no real table has, take many times their size in memory.
    Reader { times: 256, ..reader("table", "x.") }.run(make, read);
}

#[test]
fn superglue_lines() {
    let seeds = [
        (
            Task::Wic,
            json!({"word": "bed", "sentence1": "A bed.", "sentence2": "Sea bed.", "idx": 0, "label": false}),
        ),
        (Task::BoolQ, json!({"question": "is it", "passage": "It is.", "idx": 0, "label": true})),
        (Task::Rte, json!({"premise": "A.", "hypothesis": "B.", "label": "not_entailment", "idx": 0})),
    ];
    let path = Path::new("x.jsonl");
    let names = ["word", "label", "question", "passage", "premise", "hypothesis", "sentence1"];
    let documents: Vec<Documents> = seeds
        .iter()
        .map(|(_, seed)| Documents::new(vec![seed.clone()], vec![json!("entailment")], &names))
        .collect();
    for (task, seed) in &seeds {
        superglue::read_from(*task, seed.to_string().as_bytes(), path).unwrap();
    }
    let make = |rng: &mut Rng| {
        let kind = rng.below(seeds.len());
        let sound = format!("{}\n", seeds[kind].1);
        let line = documents[kind].text(rng);
        Input::one(kind, if rng.once_in(2) { [sound.as_bytes(), &line].concat() } else { line })
    };
    let read = |input: &Input| superglue::read_from(seeds[input.kind].0, &input.files[0][..], path).map(drop);
    reader("superglue", "x.jsonl").run(make, read);
}

#[test]
fn instructions() {
    use instruct::Format::{Code, Gsm8k, Instruct, Text};
    let choice = json!({"instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "input": "", "output": "the correct answer is answer2", "answer": "answer2"});
    let seeds = [
        (Instruct, choice),
        (Gsm8k, json!({"question": "1 + 1?", "answer": "It is 2.\n#### 2"})),
        (
            Code,
            json!({"prompt": "def f():\n", "canonical_solution": "    pass", "entry_point": "f", "test": "check(f)"}),
        ),
        (Text, json!({"text": "Once upon a time."})),
    ];
    let path = Path::new("x.json");
    let names =
        ["instruction", "input", "output", "answer", "question", "prompt", "entry_point", "test", "text"];
    let values: Vec<Value> = ["Answer format:", "Answer format: a/b/answer2", "answer1", "///", " ", "1f"]
        .map(Value::from)
        .into_iter()
        .chain([
            json!(format!("Answer format: {}answer2", "a/".repeat(500))),
            json!("x".repeat(2000) + "answer2"),
        ])
        .collect();
    // As a line, and as an array of rows.
    let documents: Vec<Documents> = seeds
        .iter()
        .map(|(_, seed)| Documents::new(vec![seed.clone(), json!([seed, seed])], values.clone(), &names))
        .collect();
    for (format, seed) in &seeds {
        instruct::read_from(seed.to_string().as_bytes(), path, *format).unwrap();
        instruct::read_from(json!([seed]).to_string().as_bytes(), path, *format).unwrap();
    }
    let make = |rng: &mut Rng| {
        let kind = rng.below(seeds.len());
        Input::one(kind, documents[kind].text(rng))
    };
    let read = |input: &Input| instruct::read_from(&input.files[0][..], path, seeds[input.kind].0).map(drop);
    reader("instruct", "x.json").run(make, read);
}

#[test]
fn conversations() {
    let text =
        "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}";
    let template = ChatTemplate::parse(text, Path::new("x.jinja"), &[]).unwrap();
    let turn = |role: &str| json!({"role": role, "content": [{"type": "text", "text": "Caf\u{e9}?"}]});
    let said = |from: &str| json!({"from": from, "value": "Why?"});
    let seeds = [
        json!({"messages": [turn("user"), turn("assistant"), turn("user"), turn("assistant")]}),
        json!({"conversations": [said("human"), said("gpt")], "system": "Be brief."}),
        json!({"prompt": [turn("user")], "completion": [turn("assistant")], "tools": [{"name": "f"}]}),
    ];
    let path = Path::new("x.jsonl");
    let read = |bytes: &[u8]| chat::read_from(bytes, path, &template).map(drop);
    let names = ["messages", "role", "content", "from", "value", "prompt", "completion", "tools", "weight"];
    let values = ["user", "assistant", "gpt", "[]", " "].map(Value::from).to_vec();
    for seed in &seeds {
        read(json!([seed]).to_string().as_bytes()).unwrap();
    }
    let document = |seed: &Value| Documents::new(vec![seed.clone(), json!([seed])], values.clone(), &names);
    let documents: Vec<Documents> = seeds.iter().map(document).collect();
    let make = |rng: &mut Rng| Input::one(0, documents[rng.below(documents.len())].text(rng));
    // Each turn is rendered with all that stand before it.
    Reader { cost: 8, times: 512, ..reader("chat", "x.jsonl") }.run(make, |input| read(&input.files[0]));
}
