//! The [`linears!`](crate::linears) macro, which implements both visiting methods of an [`AdaptableModel`].

use std::sync::Arc;

use super::linear::AdaptableLinear;
use super::model::AdaptableModel;
use crate::error::{Error, Result};

/// The types that [`linears!`](crate::linears) accepts as fields: a linear layer, a model or block
/// ([`AdaptableModel`]), and vectors, arrays, options and shared pointers of these.
pub trait Linears {
    /// Calls `f` on every layer.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()>;

    /// Calls `f` on every layer, to change it in place.
    ///
    /// # Errors
    /// The first error of `f`, or that of [`Self::check_unshared`].
    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()>;

    /// Checks that all layers can be changed, before the first one is: either all change or none.
    ///
    /// # Errors
    /// If a layer behind a shared pointer is still part of a graph that waits for its backward pass (gradient
    /// checkpointing). Drop that graph first.
    fn check_unshared(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Linears for AdaptableLinear {
    fn visit(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()> {
        f(self)
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()> {
        f(self)
    }
}

impl<M: AdaptableModel> Linears for M {
    fn visit(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()> {
        self.visit_linears(f)
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()> {
        self.visit_linears_mut(f)
    }
}

impl<L: Linears> Linears for Arc<L> {
    fn visit(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()> {
        (**self).visit(f)
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()> {
        unshared(self)?.visit_mut(f)
    }

    fn check_unshared(&mut self) -> Result<()> {
        unshared(self)?.check_unshared()
    }
}

fn unshared<L>(layer: &mut Arc<L>) -> Result<&mut L> {
    let reason = "a layer waits for the backward pass of a loss: drop the loss first";
    Arc::get_mut(layer).ok_or_else(|| Error::config("model", reason))
}

/// Implements [`Linears`] for a collection.
macro_rules! collection {
    ([$($generics:tt)*] $collection:ty) => {
        impl<L: Linears, $($generics)*> Linears for $collection {
            fn visit(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()> {
                self.iter().try_for_each(|item| item.visit(f))
            }

            fn visit_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()> {
                self.check_unshared()?;
                self.iter_mut().try_for_each(|item| item.visit_mut(f))
            }

            fn check_unshared(&mut self) -> Result<()> {
                self.iter_mut().try_for_each(L::check_unshared)
            }
        }
    };
}

collection!([] Vec<L>);
collection!([] Option<L>);
collection!([const N: usize] [L; N]);

/// Implements both visiting methods of an [`AdaptableModel`] from one list of the fields that hold its linear
/// layers, in the order of the model.
///
/// # Example
/// ```
/// use monteclora::{linears, AdaptableLinear, AdaptableModel};
///
/// struct Block {
///     up: AdaptableLinear,
///     down: AdaptableLinear,
/// }
///
/// impl AdaptableModel for Block {
///     linears!(up, down);
/// }
///
/// struct Model {
///     blocks: Vec<Block>,
///     pooler: Option<AdaptableLinear>,
/// }
///
/// impl AdaptableModel for Model {
///     fn default_targets(&self) -> &'static [&'static str] {
///         &["up"]
///     }
///     linears!(blocks, pooler);
/// }
/// ```
#[doc(hidden)]
#[macro_export]
macro_rules! __linears {
    ($($($field:tt).+),+ $(,)?) => {
        fn visit_linears(
            &self,
            f: &mut dyn FnMut(&$crate::AdaptableLinear) -> $crate::Result<()>,
        ) -> $crate::Result<()> {
            $($crate::adapter::Linears::visit(&self.$($field).+, f)?;)+
            Ok(())
        }

        fn visit_linears_mut(
            &mut self,
            f: &mut dyn FnMut(&mut $crate::AdaptableLinear) -> $crate::Result<()>,
        ) -> $crate::Result<()> {
            $($crate::adapter::Linears::check_unshared(&mut self.$($field).+)?;)+
            $($crate::adapter::Linears::visit_mut(&mut self.$($field).+, f)?;)+
            Ok(())
        }
    };
}

#[doc(inline)]
pub use __linears as linears;

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use candle_nn::Linear;

    use super::*;

    struct Block {
        inner: [AdaptableLinear; 2],
        skip: Option<AdaptableLinear>,
    }

    impl AdaptableModel for Block {
        linears!(inner, skip);
    }

    struct Model {
        first: Block,
        head: AdaptableLinear,
        blocks: Vec<Arc<Block>>,
    }

    impl AdaptableModel for Model {
        linears!(first.inner, first.skip, head, blocks);
    }

    fn model() -> Result<Model> {
        let weight = Tensor::ones((2, 2), DType::F32, &Device::Cpu)?;
        let linear = |name: &str| AdaptableLinear::new(name, Linear::new(weight.clone(), None));
        let first = Block { inner: [linear("a"), linear("b")], skip: Some(linear("c")) };
        let block = Block { inner: [linear("e"), linear("f")], skip: None };
        Ok(Model { first, head: linear("d"), blocks: vec![Arc::new(block)] })
    }

    #[test]
    fn both_walks_see_every_layer_once_and_in_order() -> Result<()> {
        let (mut model, mut shared, mut own) = (model()?, String::new(), String::new());
        model.visit_linears(&mut |layer| {
            shared += layer.path();
            Ok(())
        })?;
        model.visit_linears_mut(&mut |layer| {
            own += layer.path();
            Ok(())
        })?;
        assert_eq!((shared.as_str(), own.as_str()), ("abcdef", "abcdef"));
        Ok(())
    }

    #[test]
    fn a_layer_in_use_stops_a_change_before_it_begins() -> Result<()> {
        let (mut model, mut seen) = (model()?, 0);
        let graph = model.blocks[0].clone();
        let changed = model.visit_linears_mut(&mut |_| {
            seen += 1;
            Ok(())
        });
        assert!(changed.unwrap_err().to_string().contains("waits for the backward pass"));
        assert_eq!(seen, 0);
        drop(graph);
        assert!(model.visit_linears_mut(&mut |_| Ok(())).is_ok());
        Ok(())
    }
}
