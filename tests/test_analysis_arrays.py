"""Arrays in files, read by several threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from atlas.analysis import arrays
from atlas.analysis.arrays import open_arrays, read_npy, read_npz, save_arrays


def test_headers_are_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """Python 3.11 counts the depth of its parser, which numpy uses for them, for all threads together."""
    save_arrays(tmp_path / "folder", {"x": np.arange(3)})
    np.savez(tmp_path / "some.npz", a=np.arange(4), b=np.array(5))
    np.save(tmp_path / "one.npy", np.arange(6))
    inside, most, load = [0], [0], np.load
    alone = threading.Lock()

    def counted(*given, **named):
        with alone:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        try:
            return load(*given, **named)
        finally:
            with alone:
                inside[0] -= 1

    monkeypatch.setattr(arrays.np, "load", counted)
    with ThreadPoolExecutor(6) as pool:
        folders = [pool.submit(open_arrays, tmp_path / "folder", ("x",)) for _ in range(4)]
        zips = [pool.submit(read_npz, tmp_path / "some.npz") for _ in range(4)]
        ones = [pool.submit(read_npy, tmp_path / "one.npy") for _ in range(4)]
    assert most == [1]
    assert {int(one.result()["x"][2]) for one in folders} == {2}
    assert {(int(one.result()["a"][3]), int(one.result()["b"])) for one in zips} == {(3, 5)}
    assert {int(one.result()[5]) for one in ones} == {5}
