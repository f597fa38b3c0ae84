//! What the torture test holds a history against: each thing that can be wrong in one is seen, and named by its promise.

#[path = "../torture/history.rs"]
#[allow(dead_code, reason = "some of it only the torture test itself needs")]
mod history;
#[path = "../torture/model.rs"]
mod model;

use uuid::Uuid;

use history::{Account, Answer, Asked, Call, End, Entry, Fields, ForeignDebit, History, Order, Outcome};

const ANN: &str = "ann";

fn call(begun: i64, ended: i64, asked: Asked, outcome: Outcome) -> Call {
    Call { begun, ended, asked, outcome }
}

fn answered(status: u16, orders: Vec<Order>, balance: Option<i64>) -> Outcome {
    Outcome::Answered(Answer { status, orders, balance, ..Answer::default() })
}

fn order(n: u128, amount: i64, status: &str) -> Order {
    let reason = (status == "Cancelled").then(|| "insufficient_funds".to_owned());
    let fields = Fields { user: ANN.into(), amount, description: None };
    Order { id: Uuid::from_u128(n), fields, status: status.into(), reason }
}

fn entry(id: i64, at: i64, amount: i64, balance_after: i64, order: Option<u128>) -> Entry {
    Entry { id, amount, balance_after, order: order.map(Uuid::from_u128), at }
}

fn place(begun: i64, order: &Order, outcome: Outcome) -> Call {
    call(begun, begun + 5, Asked::Place { id: order.id, fields: order.fields.clone() }, outcome)
}

fn get(begun: i64, order: &Order) -> Call {
    call(begun, begun + 5, Asked::Get { id: order.id }, answered(200, vec![order.clone()], None))
}

fn deposit(begun: i64, amount: i64, outcome: Outcome) -> Call {
    call(begun, begun + 5, Asked::Deposit { user: ANN.into(), amount, key: None }, outcome)
}

/// An account, a deposit of 100, one that timed out and came through, an order of 60 that is paid, one of 500 that is not, a read of
/// each kind, and another producer's order of 7.
fn good() -> (History, End) {
    let (paid, refused) = (order(1, 60, "Finished"), order(2, 500, "Cancelled"));
    let new = |order: &Order| Order { status: "New".into(), reason: None, ..order.clone() };
    let calls = vec![
        call(0, 5, Asked::Open { user: ANN.into() }, answered(200, Vec::new(), Some(0))),
        deposit(10, 100, answered(200, Vec::new(), Some(100))),
        place(20, &paid, answered(201, vec![new(&paid)], None)),
        get(30, &new(&paid)),
        get(40, &paid),
        call(50, 55, Asked::Balance { user: ANN.into() }, answered(200, Vec::new(), Some(40))),
        deposit(60, 30, Outcome::Indefinite("no answer in time".into())),
        place(70, &refused, Outcome::Indefinite("no answer in time".into())),
        place(80, &refused, answered(200, vec![new(&refused)], None)),
    ];
    let foreign = vec![ForeignDebit { order: Uuid::from_u128(9), user: ANN.into(), amount: 7 }];
    let ledger = vec![
        entry(1, 12, 100, 100, None),
        entry(2, 35, -60, 40, Some(1)),
        entry(3, 65, 30, 70, None),
        entry(4, 90, -7, 63, Some(9)),
    ];
    let orders = [paid, refused].map(|order| (order.id, order)).into();
    (History { calls, foreign }, End { orders, accounts: [(ANN.to_owned(), Account { balance: 63, ledger })].into() })
}

/// The promises that a changed history breaks.
#[track_caller]
fn broken(change: impl FnOnce(&mut History, &mut End)) -> Vec<String> {
    let (mut history, mut end) = good();
    change(&mut history, &mut end);
    let violations = model::check(&history, &end).violations;
    violations.iter().map(|violation| violation.split_once(':').unwrap().0.to_owned()).collect()
}

fn account(end: &mut End) -> &mut Account {
    end.accounts.get_mut(ANN).unwrap()
}

fn stored(end: &mut End, n: u128) -> &mut Order {
    end.orders.get_mut(&Uuid::from_u128(n)).unwrap()
}

#[test]
fn a_history_of_which_all_is_true_breaks_nothing_and_all_of_it_was_looked_at() {
    let (history, end) = good();
    let verdict = model::check(&history, &end);
    assert_eq!(verdict.violations, Vec::<String>::new());
    let checked = verdict.checked;
    assert_eq!((checked.orders, checked.finished, checked.deposits, checked.foreign), (2, 1, 2, 1));
    assert_eq!((checked.ledger, checked.indefinite, checked.reads), (4, 2, 5));
}

#[test]
fn an_indefinite_call_may_have_come_to_nothing() {
    let nothing = broken(|history, end| {
        history
            .calls
            .retain(|call| !matches!(&call.asked, Asked::Place { id, .. } if *id == Uuid::from_u128(2) && call.answer().is_some()));
        end.orders.remove(&Uuid::from_u128(2));
        account(end).ledger.truncate(2);
        account(end).balance = 40;
    });
    assert_eq!(nothing, Vec::<String>::new());
}

#[test]
fn each_thing_that_is_wrong_with_an_order_is_seen() {
    assert_eq!(broken(|_, end| drop(end.orders.remove(&Uuid::from_u128(2)))), ["S6", "S6"]);
    assert_eq!(broken(|_, end| stored(end, 2).status = "New".into()), ["L1"]);
    assert!(broken(|_, end| stored(end, 2).fields.amount = 501).contains(&"S6".into()));
    assert_eq!(broken(|_, end| drop(end.orders.insert(Uuid::from_u128(3), order(3, 1, "Cancelled")))), ["S6"]);
    assert_eq!(
        broken(|history, _| {
            let again = history.calls[2].clone();
            history.calls.push(again);
        }),
        ["S11"]
    );
    let conflict = Outcome::Answered(Answer { status: 409, code: "order_conflict".into(), ..Answer::default() });
    assert_eq!(broken(|history, _| history.calls.push(place(95, &order(1, 60, "New"), conflict.clone()))), ["S11"]);
    assert!(broken(|history, _| history.calls.push(place(95, &order(1, 61, "New"), conflict))).is_empty());
    let other = order(1, 61, "New");
    assert_eq!(
        broken(|history, _| history.calls.push(place(95, &other, answered(200, vec![order(1, 60, "Finished")], None)))),
        ["S11"]
    );
}

#[test]
fn a_status_that_went_back_or_changed_is_seen() {
    assert_eq!(broken(|history, _| history.calls.push(get(46, &order(1, 60, "New")))), ["S5"]);
    assert!(broken(|history, _| history.calls.push(get(44, &order(1, 60, "New")))).is_empty(), "side by side");
    assert_eq!(broken(|history, _| history.calls.push(get(46, &order(1, 60, "Cancelled")))), ["S5"]);
    let absent = Outcome::Answered(Answer { status: 404, code: "order_not_found".into(), ..Answer::default() });
    let asked = Asked::Get { id: Uuid::from_u128(1) };
    assert_eq!(broken(|history, _| history.calls.push(call(96, 97, asked, absent))), ["S6"]);
}

#[test]
fn each_thing_that_is_wrong_with_the_money_is_seen() {
    assert_eq!(broken(|_, end| account(end).balance = 64), ["S1"]);
    assert!(broken(|_, end| account(end).ledger[1].balance_after = 41).contains(&"S8".into()));
    let twice = broken(|_, end| {
        account(end).ledger.push(entry(5, 95, -60, 3, Some(1)));
        account(end).balance = 3;
    });
    assert_eq!(twice, ["S3"]);
    let negative = broken(|_, end| {
        account(end).ledger.push(entry(5, 95, -64, -1, Some(8)));
        account(end).balance = -1;
    });
    assert_eq!(negative, ["S2", "S4"]);
    assert_eq!(broken(|_, end| stored(end, 1).fields.amount = 59).iter().filter(|promise| *promise == "S4").count(), 1);
    let unpaid = broken(|_, end| {
        account(end).ledger.remove(1);
        account(end).ledger[1].balance_after = 130;
        account(end).ledger[2].balance_after = 123;
        account(end).balance = 123;
    });
    assert!(unpaid.contains(&"S4".into()), "{unpaid:?}");
    let enough = broken(|_, end| {
        stored(end, 2).fields.amount = 30;
        stored(end, 2).reason = Some("insufficient_funds".into());
    });
    assert!(enough.contains(&"S4".into()));
    // With what the deposit of 30 brought there would have been: it was written before the order was placed, and nobody knows when it was there.
    let side_by_side = broken(|history, end| {
        for call in &mut history.calls {
            if let Asked::Place { id, fields } = &mut call.asked
                && *id == Uuid::from_u128(2)
            {
                fields.amount = 60;
            }
            if let Outcome::Answered(answer) = &mut call.outcome {
                answer.orders.iter_mut().filter(|order| order.id == Uuid::from_u128(2)).for_each(|order| order.fields.amount = 60);
            }
        }
        stored(end, 2).fields.amount = 60;
    });
    assert_eq!(side_by_side, Vec::<String>::new());
    assert_eq!(broken(|_, end| stored(end, 2).reason = Some("account_not_found".into())), ["S4"]);
    assert_eq!(broken(|_, end| stored(end, 2).reason = None), ["S4"]);
}

#[test]
fn each_thing_that_is_wrong_with_a_deposit_is_seen() {
    let lost = broken(|_, end| {
        let account = account(end);
        account.ledger = vec![entry(3, 65, 30, 30, None), entry(4, 90, -7, 23, Some(9))];
        account.balance = 23;
        stored(end, 1).status = "Cancelled".into();
        stored(end, 1).reason = Some("insufficient_funds".into());
    });
    assert!(lost.contains(&"S9".into()), "{lost:?}");
    let twice = broken(|_, end| {
        account(end).ledger.push(entry(5, 95, 30, 93, None));
        account(end).balance = 93;
    });
    assert_eq!(twice, ["S9"]);
    let unasked = broken(|_, end| {
        account(end).ledger.push(entry(5, 95, 31, 94, None));
        account(end).balance = 94;
    });
    assert_eq!(unasked, ["S9"]);
    let keyed = |amount| Asked::Deposit { user: ANN.into(), amount, key: Some("k".into()) };
    let both = broken(|history, end| {
        for (amount, balance) in [(1, 64), (2, 66)] {
            history.calls.push(call(95, 98, keyed(amount), answered(200, Vec::new(), Some(balance))));
            account(end).ledger.push(entry(4 + amount, 96, amount, balance, None));
        }
        account(end).balance = 66;
    });
    assert_eq!(both, ["S11"]);
    assert_eq!(broken(|history, _| history.calls.push(deposit(95, 100, answered(200, Vec::new(), Some(100))))), ["S11"]);
    assert!(broken(|history, _| history.calls[1] = deposit(10, 100, answered(200, Vec::new(), Some(99)))).contains(&"S9".into()));
}

#[test]
fn an_account_that_is_lost_or_opened_twice_is_seen() {
    let open = |user: &str| call(95, 96, Asked::Open { user: user.into() }, answered(200, Vec::new(), Some(0)));
    assert_eq!(broken(|history, _| history.calls.push(open(ANN))), ["S10"]);
    assert_eq!(broken(|history, _| history.calls.push(open("bob"))), ["S10"]);
}

#[test]
fn a_balance_that_the_account_never_had_or_no_longer_had_is_seen() {
    let read =
        |begun, balance| call(begun, begun + 5, Asked::Balance { user: ANN.into() }, answered(200, Vec::new(), Some(balance)));
    assert_eq!(broken(|history, _| history.calls.push(read(95, 41))), ["S9"]);
    assert_eq!(broken(|history, _| history.calls.push(read(20, 0))), ["S9"], "a deposit had been acknowledged");
    assert!(broken(|history, _| history.calls.push(read(12, 0))).is_empty(), "it had not");
    assert_eq!(broken(|history, _| history.calls.push(read(40, 70))), ["S9"], "before it was made");
    assert_eq!(broken(|history, _| history.calls.push(read(95, -1))), ["S2"]);
}

#[test]
fn an_answer_that_the_contract_does_not_know_is_seen() {
    assert_eq!(broken(|history, _| history.calls.push(deposit(95, 1, answered(500, Vec::new(), None)))), ["contract"]);
    assert_eq!(
        broken(|history, _| history.calls.push(call(95, 96, Asked::Open { user: ANN.into() }, answered(503, Vec::new(), None)))),
        ["contract"]
    );
}
