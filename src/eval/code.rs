//! HumanEval: programs from a model's completions, and pass@k.
//!
//! Chen et al., "Evaluating Large Language Models Trained on Code" (2021).

use super::sandbox::{Outcome, Sandbox};
use crate::data::instruct::ProgramTests;
use crate::error::{Error, Result};

/// The texts that end a completion (section 3.1).
pub const STOP: [&str; 5] = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"];

/// Returns the program that fails if the completion of a prompt is wrong.
pub fn program(prompt: &str, completion: &str, tests: &ProgramTests) -> String {
    format!("{prompt}{completion}\n{}\ncheck({})", tests.test, tests.entry_point)
}

/// The unbiased estimate of the probability that at least one of `k` completions passes, given that `correct`
/// of `n` completions passed (equation 1): `1 - C(n - c, k) / C(n, k)`.
///
/// # Errors
/// If `k` is 0 or above `n`, or `correct` is above `n`.
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

/// Returns the number of whole programs that pass.
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

    #[test]
    fn pass_at_k_is_the_share_of_subsets_with_a_right_one() {
        // By counting subsets: of 5 completions with 2 correct, C(3, 2) / C(5, 2) = 3 / 10 contain none.
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
        let test = "def check(candidate):\n    assert candidate(1, 2) == 3\n".to_string();
        let tests = ProgramTests { entry_point: "add".to_string(), test };
        let completed = |completion: &str| format!("def add(a, b):\n{completion}");
        for (completion, passed) in [
            ("    return a + b\n", 1),
            ("    return a - b\n", 0),
            ("    return a +", 0),
            ("    exit(0)\n", 0),
        ] {
            assert_eq!(passing(&tests, &[completed(completion)], &sandbox).unwrap(), passed, "{completion}");
        }
        let all = ["    return a + b\n", "    return a - b\n"].map(completed);
        assert_eq!(passing(&tests, &all, &sandbox).unwrap(), 1);
    }
}
