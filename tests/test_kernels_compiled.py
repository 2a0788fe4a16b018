"""Compiled loops on disk: two processes that compile at once never mix up what they keep."""

import threading

from numba.core.caching import IndexDataCacheFile

from atlas.kernels.compiled import _OneAtATime, compiled


def test_of_two_that_keep_code_at_once_each_finds_its_own(tmp_path, monkeypatch):
    one, two = (_OneAtATime(str(tmp_path), "loop", b"stamp") for _ in range(2))
    noted, go_on = threading.Event(), threading.Event()
    write = IndexDataCacheFile._save_index

    def note(self, overloads):
        if self is one:  # between having looked for a free name and noting it
            noted.set()
            go_on.wait(1)
        write(self, overloads)

    monkeypatch.setattr(IndexDataCacheFile, "_save_index", note)
    threads = [threading.Thread(target=file.save, args=(key, key)) for file, key in ((one, "a"), (two, "b"))]
    threads[0].start()
    noted.wait()
    threads[1].start()
    threads[1].join(0.3)  # it waits, or has written by then
    go_on.set()
    for thread in threads:
        thread.join()
    assert (two.load("a"), one.load("b")) == ("a", "b")


def test_compiled_functions_keep_their_code_so():
    assert type(compiled(len_of)._cache._cache_file) is _OneAtATime


def len_of(x):
    return len(x)
