//! The hub's client against a hub on the loopback: what it finds, fetches, refuses and never tells.

mod fixture;
mod repositories;
mod secrets;
mod server;
mod transfers;
