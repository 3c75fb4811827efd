//! HumanEval: the programs that a model's completions make, pass@k.
//!
//! Chen et al., "Evaluating Large Language Models Trained on Code" (2021).

use super::sandbox::{Outcome, Sandbox};
use crate::data::instruct::{ProgramTests, Prompted};
use crate::error::{Error, Result};

/// What ends a completion (section 3.1).
pub const STOP: [&str; 5] = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"];

/// The program that fails where the completion of a prompt is wrong.
pub fn program(prompt: &str, completion: &str, tests: &ProgramTests) -> String {
    format!("{prompt}{completion}\n{}\ncheck({})", tests.test, tests.entry_point)
}

/// The unbiased estimate of the probability that one of `k` completions passes, from `n` of which
/// `correct` passed (equation 1): `1 - C(n - c, k) / C(n, k)`.
///
/// # Errors
/// If `k` is 0 or above `n`, or more passed than there are.
pub fn pass_at_k(n: usize, correct: usize, k: usize) -> Result<f64> {
    if k == 0 || k > n || correct > n {
        let reason = format!("{correct} of {n} completions passed: expected k in 1 to {n}, got {k}");
        return Err(Error::config("pass@k", reason));
    }
    if n - correct < k {
        return Ok(1.0);
    }
    Ok(1.0 - (n - correct + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>())
}

/// The mean over rows of pass@k, for each of `ks`: runs every completion in the sandbox, `completions`
/// holding those of each row.
///
/// # Errors
/// If there is no row, not as many groups of completions as rows, a row has no tests, there are too
/// few completions for a `k`, or a process cannot be started.
pub fn pass_rates(
    rows: &[Prompted],
    completions: &[Vec<String>],
    ks: &[usize],
    sandbox: &Sandbox,
) -> Result<Vec<f64>> {
    let whole = |(row, group): (&Prompted, &Vec<String>)| {
        group.iter().map(|completion| format!("{}{completion}", row.prompt)).collect()
    };
    check_groups(rows, completions)?;
    let programs: Vec<Vec<String>> = rows.iter().zip(completions).map(whole).collect();
    program_pass_rates(rows, &programs, ks, sandbox)
}

fn check_groups(rows: &[Prompted], groups: &[Vec<String>]) -> Result<()> {
    if rows.is_empty() || rows.len() != groups.len() {
        let reason = format!("{} rows, {} groups of completions", rows.len(), groups.len());
        return Err(Error::config("completions", reason));
    }
    Ok(())
}

/// [`pass_rates`] of whole programs, their prompts in them, without their tests.
///
/// # Errors
/// As [`pass_rates`].
pub fn program_pass_rates(
    rows: &[Prompted],
    programs: &[Vec<String>],
    ks: &[usize],
    sandbox: &Sandbox,
) -> Result<Vec<f64>> {
    check_groups(rows, programs)?;
    // Before anything is run.
    for (programs, k) in programs.iter().flat_map(|group| ks.iter().map(move |k| (group, k))) {
        pass_at_k(programs.len(), 0, *k)?;
    }
    let mut sums = vec![0.0; ks.len()];
    for (i, (row, programs)) in rows.iter().zip(programs).enumerate() {
        let correct = passing(row.tests(i)?, programs, sandbox)?;
        for (sum, k) in sums.iter_mut().zip(ks) {
            *sum += pass_at_k(programs.len(), correct, *k)?;
        }
    }
    Ok(sums.into_iter().map(|sum| sum / rows.len() as f64).collect())
}

/// How many of some whole programs pass.
pub(super) fn passing(tests: &ProgramTests, programs: &[String], sandbox: &Sandbox) -> Result<usize> {
    let mut correct = 0;
    for source in programs {
        let outcome = sandbox.run(&program("", source, tests))?;
        correct += usize::from(outcome == Outcome::Passed);
    }
    Ok(correct)
}

#[cfg(test)]
mod tests {
    use super::super::sandbox::Limits;
    use super::*;

    fn add() -> Prompted {
        let test = "def check(candidate):\n    assert candidate(1, 2) == 3\n".to_string();
        let tests = Some(ProgramTests { entry_point: "add".to_string(), test });
        Prompted { prompt: "def add(a, b):\n".to_string(), tests, ..Prompted::default() }
    }

    #[test]
    fn pass_at_k_is_the_share_of_subsets_with_a_right_one() {
        // By counting subsets: of 5 with 2 right, C(3, 2) / C(5, 2) = 3 / 10 have none.
        for (n, correct, k, expected) in
            [(5, 2, 2, 0.7), (5, 2, 1, 0.4), (5, 0, 3, 0.0), (5, 5, 1, 1.0), (5, 3, 3, 1.0), (4, 1, 4, 1.0)]
        {
            let got = pass_at_k(n, correct, k).unwrap();
            assert!((got - expected).abs() < 1e-12, "{n} {correct} {k}: {got}");
        }
        // Large numbers neither overflow nor lose their digits: 1 - C(195, 100) / C(200, 100).
        assert!((pass_at_k(200, 5, 100).unwrap() - 0.970_308_394_765_706_7).abs() < 1e-12);
        for (n, correct, k) in [(5, 2, 0), (5, 2, 6), (5, 6, 1), (0, 0, 1)] {
            assert!(pass_at_k(n, correct, k).unwrap_err().to_string().contains("pass@k"));
        }
    }

    #[test]
    fn right_completions_pass_and_wrong_ones_do_not() {
        let Ok(sandbox) = Sandbox::new("python3", Limits::default()) else {
            crate::testing::skipped("programs cannot be limited here");
            return;
        };
        let completions = ["    return a + b\n", "    return a - b\n", "    return a +", "    exit(0)\n"];
        let completions = vec![completions.map(String::from).to_vec()];
        let rates = pass_rates(&[add()], &completions, &[1, 2], &sandbox).unwrap();
        assert_eq!(rates, [0.25, 0.5]);
        let fails = |rows: &[Prompted], ks: &[usize]| {
            pass_rates(rows, &completions, ks, &sandbox).unwrap_err().to_string()
        };
        assert!(fails(&[add()], &[5]).contains("expected k in 1 to 4, got 5"));
        assert!(fails(&[add(), add()], &[1]).contains("2 rows, 1 groups"));
        assert!(fails(&[Prompted { tests: None, ..add() }], &[1]).contains("row 1 has no tests"));
    }
}
