//! Scores against scikit-learn and SciPy. Each constant is followed by the Python that computed it, after
//! `from sklearn.metrics import *` and `import numpy as np`.

use super::*;

fn close(got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-14 * want.abs().max(1.0), "{got} is not {want}");
}

/// Top probabilities 0.7, 0.6, 0.8, 0.9 and 0.55: right, wrong, right, right, wrong.
fn two_classes() -> (Vec<Vec<f64>>, [u32; 5]) {
    let rows = [[0.3, 0.7], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1], [0.45, 0.55]];
    (rows.map(Vec::from).to_vec(), [1, 1, 1, 0, 0])
}

#[test]
fn two_classes_agree_with_scikit_learn() -> Result<()> {
    let (p, l) = two_classes();
    let metrics = Metrics::classification(&p, &l)?;
    let get = |name| metrics.get(name).unwrap();
    // P = np.array([[.3,.7],[.6,.4],[.2,.8],[.9,.1],[.45,.55]]); L = [1,1,1,0,0]; p = P.argmax(1)
    close(get("accuracy"), 0.6); // accuracy_score(L, p)
    close(get("f1"), 0.6666666666666666); // f1_score(L, p)
    close(get("matthews"), 0.16666666666666666); // matthews_corrcoef(L, p)
    close(get("nll"), 0.4799954878005391); // log_loss(L, P)
    close(get("brier"), 0.321); // 2 * brier_score_loss(L, P[:, 1])

    // By hand: 0.55 and 0.6 share the bin (8/15, 9/15], every other row has its own.
    close(get("ece"), ((0.55 + 0.6) + 0.3 + 0.2 + 0.1) / 5.0);
    assert_eq!((get("accuracy"), metrics.pearson, metrics.get("bleu")), (0.6, None, None));
    Ok(())
}

#[test]
fn three_classes_agree_with_scikit_learn_and_have_no_f1() -> Result<()> {
    let rows = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3], [0.05, 0.05, 0.9]];
    let metrics = Metrics::classification(&rows.map(Vec::from), &[0, 1, 2, 2])?;
    let get = |name| metrics.get(name).unwrap();
    // P = np.array([[.7,.2,.1],[.1,.6,.3],[.2,.5,.3],[.05,.05,.9]]); L = [0,1,2,2]; p = P.argmax(1)
    close(get("accuracy"), 0.75); // accuracy_score(L, p)
    close(get("matthews"), 0.7); // matthews_corrcoef(L, p)
    close(get("nll"), 0.5442084719221214); // log_loss(L, P)
    close(get("brier"), 0.29875); // np.mean(np.sum((P - np.eye(3)[L])**2, 1))
    assert_eq!(metrics.f1, None);
    Ok(())
}

#[test]
fn scores_of_predicted_classes_agree_with_scikit_learn() -> Result<()> {
    let (l, p) = ([0, 1, 1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1, 1, 1]);
    close(accuracy(&p, &l)?, 0.75); // accuracy_score([0,1,1,0,1,0,1,1], [0,1,0,0,1,1,1,1])
    close(f1(&p, &l, 1)?, 0.8); // f1_score([0,1,1,0,1,0,1,1], [0,1,0,0,1,1,1,1])
    close(matthews(&p, &l)?, 0.4666666666666667); // matthews_corrcoef of the same
    let (l, p) = ([0, 1, 2, 2, 1, 0, 2, 1], [0, 2, 2, 1, 1, 0, 2, 0]);
    close(matthews(&p, &l)?, 0.4523809523809524); // matthews_corrcoef([0,1,2,2,1,0,2,1], [0,2,2,1,1,0,2,0])
    assert_eq!((matthews(&[1, 1, 1], &[0, 1, 1])?, f1(&[0, 0], &[0, 0], 1)?), (0.0, 0.0));
    Ok(())
}

#[test]
fn correlations_agree_with_scipy() -> Result<()> {
    let (a, b) = ([1.0, 2.0, 2.0, 4.0, 5.0, 3.5], [1.5, 1.0, 3.0, 3.0, 6.0, 2.0]);
    let metrics = Metrics::regression(&a, &b)?;
    let get = |name| metrics.get(name).unwrap();
    // a, b = [1,2,2,4,5,3.5], [1.5,1,3,3,6,2]
    close(get("pearson"), 0.7777870702409998); // scipy.stats.pearsonr(a, b)[0]
    close(get("spearman"), 0.7500000000000001); // scipy.stats.spearmanr(a, b)[0]
    close(get("mse"), 1.0833333333333333); // mean_squared_error(a, b)
    let flat = Metrics::regression(&[0.1, 0.1, 0.1], &[1.0, 2.0, 3.0])?;
    assert_eq!((flat.pearson, flat.spearman, flat.accuracy), (None, None, None));
    assert_eq!(pearson(&[2.0], &[3.0])?, None);
    assert_eq!(ranks(&[0.0, 3.0, -0.0, -1.0]), [2.5, 4.0, 2.5, 1.0]);
    Ok(())
}

#[test]
fn calibration_bins_are_open_below_and_closed_above() -> Result<()> {
    let row = |top: f64| vec![top, 1.0 - top];
    // (8/15, 9/15] holds 0.55 (wrong) and 0.6 (right): their gaps of -0.55 and +0.4 cancel.
    close(ece(&[row(0.55), row(0.6)], &[1, 0])?, 0.15 / 2.0);
    // 0.61 is in the next bin: nothing cancels.
    close(ece(&[row(0.55), row(0.61)], &[1, 0])?, (0.55 + 0.39) / 2.0);
    close(ece(&[row(1.0), row(1.0)], &[0, 1])?, 0.5);
    Ok(())
}

#[test]
fn probabilities_are_scipy_s_and_do_not_overflow() {
    // scipy.special.softmax([1., 2., 3.5])
    let want = [0.0628900132458675, 0.17095278019779026, 0.7661572065563422];
    softmax(&[1.0, 2.0, 3.5]).into_iter().zip(want).for_each(|(got, want)| close(got, want));
    assert_eq!(softmax(&[1e300, 1e300]), [0.5, 0.5]);
}

#[test]
fn bad_input_is_an_error_that_says_where() {
    let (p, _) = two_classes();
    let message = |p: &[Vec<f64>], l: &[u32]| Metrics::classification(p, l).unwrap_err().to_string();
    assert!(message(&[], &[]).contains("no row"));
    assert!(message(&p, &[0]).contains("5 predictions for 1 labels"));
    assert!(message(&p, &[0, 1, 0, 2, 0]).contains("row 3: label 2 of 2 classes"));
    assert!(message(&[vec![0.5, 0.5], vec![f64::NAN, 0.5]], &[0, 0]).contains("row 1: NaN"));
    assert!(message(&[vec![0.5, 0.5], vec![1.0]], &[0, 0]).contains("row 1: 1 classes"));
    let message = |p: &[f64], t: &[f64]| Metrics::regression(p, t).unwrap_err().to_string();
    assert!(message(&[], &[]).contains("no row"));
    assert!(message(&[1.0], &[]).contains("1 predictions for 0 labels"));
    assert!(message(&[1.0, f64::NAN], &[1.0, 2.0]).contains("row 1: prediction NaN, target 2"));
    assert!(message(&[1.0, 3.0], &[f64::INFINITY, 2.0]).contains("row 0: prediction 1, target inf"));
}

#[test]
fn certain_errors_are_infinite_and_absent_scores_are_not_written() -> Result<()> {
    assert_eq!(nll(&[vec![0.0, 1.0]], &[0])?, f64::INFINITY);
    assert!(nll(&[vec![0.0, 1.0]], &[1])?.is_sign_positive());
    let json = serde_json::to_string(&Metrics { mse: Some(0.5), ..Metrics::default() }).unwrap();
    assert_eq!(json, r#"{"mse":0.5}"#);
    Ok(())
}
