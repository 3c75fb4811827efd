use serde_json::json;

use super::*;

/// A plan for the bundled model.
fn bundled() -> Value {
    json!({
        "name": "bundled", "model": "tiny-roberta", "tasks": ["sst2"],
        "methods": [
            {"recipes": ["lora", "lora:held-out=0.15", "monteclora:eps=0.03"], "lrs": [5e-4, 2e-3]},
            {"recipes": ["dora"], "lrs": [2e-3]},
        ],
        "batch_sizes": [32], "seeds": [1, 2], "limit_train": 400, "epochs": "20,mrpc=15", "draws": 5,
        "families": {"primary": [
            {"arm": "monteclora:eps=0.03 (5 draws)", "against": "lora (mean)", "scores": ["nll", "ece"]},
            {"arm": "monteclora:eps=0.03 (5 draws)", "against": "lora:held-out=0.15 (temperature)", "scores": ["nll"]},
        ]},
        "success": [
            {"better": {"family": "primary", "p": 0.05}},
            {"sensitivity": {
                "arm": "monteclora:eps=0.03 (mean)", "against": "lora (mean)", "most": 0.5, "of": "variance",
            }},
            {"not_worse": {
                "arm": "monteclora:eps=0.03 (mean)", "against": "lora (mean)", "score": "accuracy", "lr": 5e-4,
                "by": 0.02,
            }},
        ],
    })
}

fn read(plan: &Value) -> Result<(Plan, String)> {
    let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    let path = dir.path().join("plan.json");
    std::fs::write(&path, plan.to_string()).map_err(Error::io(&*path))?;
    Plan::read(&path)
}

#[test]
fn a_plan_says_its_cells_and_settings_say_the_plan_again() -> Result<()> {
    let (plan, crc) = read(&bundled())?;
    // One task, two seeds, one batch size; three methods at two rates and one method at one rate.
    let cells = plan.cells()?;
    assert_eq!(cells.len(), 2 * (3 * 2 + 1));
    let dora: Vec<f64> = cells.iter().filter(|key| key.method == "dora").map(|key| key.lr).collect();
    assert_eq!(dora, [2e-3, 2e-3]);
    let mut spelt = bundled();
    spelt["tasks"][0] = json!("SST-2");
    assert_eq!(read(&spelt)?.0.cells()?, cells);
    assert_eq!(plan.epochs.get(Task::Sst2), Some(&20));
    assert_eq!((plan.epochs.get(Task::Mrpc), plan.limit_train.get(Task::Sst2)), (Some(&15), Some(&400)));
    // python3 -c 'import zlib, sys; print("%08x" % zlib.crc32(open(sys.argv[1], "rb").read()))' plan.json
    assert_eq!(crc, format!("{:08x}", crc32fast::hash(bundled().to_string().as_bytes())));
    let settings = plan.settings(&crc)?;
    assert_eq!(Plan::of_settings(&settings, Path::new("settings.json"))?, Some((plan, crc)));
    assert_eq!(Plan::of_settings(&json!({"epochs": 1}), Path::new("settings.json"))?, None);
    Ok(())
}

#[test]
fn what_does_not_fit_together_is_named_before_anything_runs() -> Result<()> {
    let changed = |pointer: &str, value: Value| {
        let mut plan = bundled();
        *plan.pointer_mut(pointer).unwrap() = value;
        plan
    };
    for (plan, reason) in [
        (changed("/tasks/0", json!("imdb")), "expected one of mrpc"),
        (changed("/epochs", json!("mrpc=15")), "epochs: there is no number for sst2"),
        (changed("/methods/1/recipes/0", json!("lora")), "lora comes twice at 0.002"),
        (changed("/methods/1/recipes/0", json!("qlora")), "none of full, lora"),
        (
            changed("/families/primary/0/arm", json!("lora (temperature)")),
            "\"lora (temperature)\" is none of its arms",
        ),
        (
            changed("/families/primary/0/against", json!("lora")),
            "expected an arm as \"lora (mean)\", got \"lora\"",
        ),
        (changed("/families/primary/0/scores", json!([])), "has no score"),
        (changed("/families/primary/0/scores/0", json!("f1")), "unknown variant"),
        (changed("/success/0/better/family", json!("second")), "no family \"second\""),
        (changed("/success/1/sensitivity/arm", json!("map (mean)")), "none of its arms"),
        (changed("/success/2/not_worse/lr", json!(1e-9)), "do not both run at"),
        (changed("/seeds", json!([])), "a list is empty"),
        (changed("/seeds", json!([1])), "2 rates in common, 1 tasks, seeds and batch sizes"),
        (changed("/draws", json!(0)), "draws: expected at least 1"),
        (changed("/tasks/0", json!("stsb")), "has no classes"),
        (changed("/families/primary", json!([])), "primary has no comparison"),
        (changed("/success/0/better/p", json!(1.0)), "expected a p between 0 and 1"),
        (changed("/success/1/sensitivity/most", json!(0.0)), "expected a positive ratio"),
    ] {
        let error = read(&plan).map(drop).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let mut unknown = bundled();
    unknown["epoch"] = json!(3);
    assert!(read(&unknown).is_err_and(|error| error.to_string().contains("unknown field `epoch`")));
    let mut apart = changed("/families/primary/0/against", json!("dora (mean)"));
    assert!(read(&apart).is_ok());
    apart["methods"][1]["lrs"] = json!([1e-2]);
    let error = read(&apart).map(drop).unwrap_err().to_string();
    assert!(error.contains("dora (mean) run at no learning rate in common"), "{error}");
    assert_eq!(read(&bundled())?.0.tested(), Some(Arm::new("monteclora:eps=0.03", "5 draws")));
    Ok(())
}
