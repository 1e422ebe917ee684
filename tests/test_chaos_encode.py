"""A short campaign of faults against real encodings, and that a wrong set of images would be seen."""

import forked
from chaos_encode import campaign


def test_encodings_survive_changed_images_and_permissions(tmp_path, monkeypatch):
    start = lambda count, *words, **_: forked.start_ranks(count, *words, unprivileged=True)  # noqa: E731
    monkeypatch.setattr("chaos_encode.start_ranks", start)
    rounds = campaign(tmp_path, ["exchange_images", "close_images"], seed=2)
    assert {r.fault for r in rounds} == {"exchange_images", "close_images"}
