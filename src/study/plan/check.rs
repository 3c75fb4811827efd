//! The checks of a plan: what it names is there, and what it compares can be compared.

use std::collections::BTreeSet;

use super::{Comparison, Criterion, Plan};
use crate::error::{Error, Result};
use crate::study::arm::Arm;
use crate::study::cell::CellKey;

impl Plan {
    /// Checks that the plan is consistent, as [`Plan::read`] describes.
    pub(super) fn check(&self) -> Result<()> {
        if self.draws == 0 {
            return Err(wrong("draws: expected at least 1, got 0"));
        }
        self.check_tasks()?;
        let cells = self.cells()?;
        if let Some(key) = cells.iter().find(|key| self.runs(&key.method, key.lr) > 1) {
            return Err(wrong(format!("methods: {} comes twice at {}", key.method, key.lr)));
        }
        let arms = self.arms()?;
        self.check_families(&arms)?;
        self.success.iter().try_for_each(|criterion| self.check_criterion(criterion, &arms, &cells))
    }

    fn check_tasks(&self) -> Result<()> {
        for task in self.tasks()? {
            if task.is_regression() {
                let reason = format!("tasks: {task} has no classes, and plans compare class probabilities");
                return Err(wrong(reason));
            }
            if self.epochs.get(task).is_none_or(|epochs| *epochs == 0) {
                return Err(wrong(format!("epochs: there is no number for {task}, or it is 0")));
            }
        }
        Ok(())
    }

    fn check_families(&self, arms: &BTreeSet<Arm>) -> Result<()> {
        if let Some((name, _)) = self.families.iter().find(|(_, family)| family.is_empty()) {
            return Err(wrong(format!("families: {name} has no comparison")));
        }
        for Comparison { arm, against, scores } in self.families.values().flatten() {
            check_known(arms, [arm, against])?;
            if arm == against {
                return Err(wrong(format!("families: {arm} is compared with itself")));
            }
            self.check_shared("families", arm, against)?;
            if scores.is_empty() {
                return Err(wrong(format!("families: {arm} against {against} has no score")));
            }
        }
        Ok(())
    }

    fn check_criterion(&self, criterion: &Criterion, arms: &BTreeSet<Arm>, cells: &[CellKey]) -> Result<()> {
        match criterion {
            Criterion::Better { family, .. } if !self.families.contains_key(family) => {
                Err(wrong(format!("success: there is no family {family:?}")))
            }
            Criterion::Better { p, .. } if !(*p > 0.0 && *p < 1.0) => {
                Err(wrong(format!("success: expected a p between 0 and 1, got {p}")))
            }
            Criterion::Better { .. } => Ok(()),
            Criterion::Sensitivity { most, .. } if !(*most > 0.0 && most.is_finite()) => {
                Err(wrong(format!("success: expected a positive ratio, got {most}")))
            }
            Criterion::Sensitivity { arm, against, .. } => {
                check_known(arms, [arm, against])?;
                self.check_shared("success", arm, against)?;
                self.check_enough(arm, against, cells)
            }
            Criterion::NotWorse { by, .. } if !by.is_finite() => {
                Err(wrong(format!("success: expected a finite difference `by`, got {by}")))
            }
            Criterion::NotWorse { arm, against, lr, .. } => {
                check_known(arms, [arm, against])?;
                self.check_shared("success", arm, against)?;
                let shared = self.shared(arm, against);
                if lr.is_some_and(|lr| !shared.contains(&lr)) {
                    return Err(wrong(format!("success: {arm} and {against} do not both run at {lr:?}")));
                }
                Ok(())
            }
        }
    }

    /// Checks that the methods of two arms share a learning rate; otherwise no two cells could be paired.
    fn check_shared(&self, place: &str, own: &Arm, other: &Arm) -> Result<()> {
        if !self.shared(own, other).is_empty() {
            return Ok(());
        }
        Err(wrong(format!("{place}: {own} and {other} run at no learning rate in common")))
    }

    /// Checks that the test of two arms' sensitivities has degrees of freedom.
    fn check_enough(&self, arm: &Arm, against: &Arm, cells: &[CellKey]) -> Result<()> {
        // It has groups * (rates - 1) - 1 degrees of freedom: one mean is lost per group.
        let rates = self.shared(arm, against).len();
        let groups = cells.iter().map(|key| (&key.task, key.seed, key.batch_size));
        let groups = groups.collect::<BTreeSet<_>>().len();
        if rates < 2 || groups * (rates - 1) < 2 {
            let too_few = format!("{rates} rates in common, {groups} tasks, seeds and batch sizes");
            return Err(wrong(format!("success: {arm} and {against}: too little to compare: {too_few}")));
        }
        Ok(())
    }
}

/// Checks that all of these arms are among the plan's.
fn check_known(arms: &BTreeSet<Arm>, named: [&Arm; 2]) -> Result<()> {
    match named.into_iter().find(|arm| !arms.contains(*arm)) {
        Some(arm) => {
            let (text, names) = (arm.to_string(), arms.iter().map(Arm::to_string).collect::<Vec<_>>());
            Err(wrong(format!("{text:?} is none of its arms: {}", names.join(", "))))
        }
        None => Ok(()),
    }
}

fn wrong(reason: impl Into<String>) -> Error {
    Error::config("plan", reason)
}
