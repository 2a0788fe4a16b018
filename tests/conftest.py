"""Fixtures that several test modules share."""

import os

import hypothesis
import pytest

from atlas import access

IN_CI = os.environ.get("CI") == "true"

# The same examples everywhere, and none refused for a machine that has other things to do.
hypothesis.settings.register_profile(
    "atlas",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("atlas")


def need(condition: object, what: str) -> None:
    """Skip on a developer's bare machine, fail in CI, where every server has to be there."""
    if condition:
        return
    if IN_CI:
        pytest.fail(f"{what} is missing, and CI must have it")
    pytest.skip(f"{what} is not installed")


LONG = (
    "test_faults.py::test_cancel_of_a_silent_step",
    "test_faults.py::test_clock_jumps",
    "test_faults.py::test_connection_breaks_in_process",
    "test_faults.py::test_network_to_the_broker_is_cut",
    "test_faults.py::test_out_of_memory",
    "test_faults.py::test_postgres_restarts",
    "test_faults.py::test_redis_is_empty_after_its_restart",
    "test_faults.py::test_two_builds_of_one_plan_in_process",
    "test_faults.py::test_worker_asked_to_end",
    "test_faults.py::test_worker_dies_elsewhere",
    "test_faults.py::test_worker_killed[merge]",
    "test_faults.py::test_worker_killed[publish]",
    "test_faults.py::test_worker_killed[published]",
    "test_faults.py::test_worker_killed[shard]",
    "test_access_app.py::test_annotating_with_a_password",
    "test_annotation_browser.py::test_a_verdict_and_a_text_survive_a_reload_at_once",
    "test_annotation_browser.py::test_blind_hides_what_others_wrote_until_saved",
    "test_annotation_browser.py::test_keys_before_the_first_form_wait_for_it",
    "test_annotation_browser.py::test_names_in_use_are_offered_and_what_is_typed_stays",
    "test_annotation_browser.py::test_the_second_writer_sees_both_texts",
    "test_annotation_browser.py::test_words_that_were_not_confirmed_are_kept_however_one_goes_on",
    "test_app_axe.py::test_no_serious_fault[compare",
    "test_app_axe.py::test_no_serious_fault[feature",
    "test_app_axe.py::test_no_serious_fault[search",
    "test_app_axe.py::test_no_serious_fault[sql",
    "test_app_axe.py::test_no_serious_fault_in_any_state",
    "test_app_axe.py::test_the_dark_theme_keeps_its_contrast",
    "test_app_browser.py::test_annotate_from_the_grid_to_the_next_head_and_back",
    "test_app_browser.py::test_related_features_are_links_and_near_misses_say_so",
    "test_app_browser.py::test_three_heads_by_keyboard_alone",
    "test_app_jobs.py::test_a_build_is_planned_started_seen_and_cancelled_in_the_browser",
    "test_app_training.py::test_the_live_view_follows_a_growing_log",
    "test_cli_build.py::test_full_disk[2000]",
    "test_cli_report.py::test_figures_in_every_format[training]",
    "test_db_annotators.py",
    "test_db_schema.py::test_processes_that_upgrade_at_once[sqlite",
    "test_feature_note_browser.py::test_a_reload_in_the_middle_of_a_draft_loses_nothing",
    "test_feature_note_browser.py::test_a_tag_that_was_not_confirmed_is_kept",
    "test_feature_note_browser.py::test_blind_hides_families_and_words_of_others_until_one_rated",
    "test_feature_note_browser.py::test_the_second_window_sees_both_texts",
    "test_feature_note_browser.py::test_what_is_typed_after_a_number_lands_in_that_feature",
    "test_feature_note_browser.py::test_what_is_typed_while_the_next_feature_opens",
    "test_interop_hub.py::test_the_command_reaches_a_mirror_and_says_what_it_cannot_reach",
    "test_pipeline.py::test_kill_9_in_training_and_in_analysis_changes_nothing",
    "test_pipeline.py::test_other_sites_build_too",
    "test_pipeline.py::test_text_beyond_the_trainings_is_analysed",
    "test_pipeline_members.py::test_a_build_from_the_cache_is_the_same_build",
    "test_sae_bank.py::test_every_architecture_learns_a_known_dictionary[batchtopk",
    "test_sae_bank.py::test_every_architecture_learns_a_known_dictionary[matryoshka",
    "test_sae_bank.py::test_every_architecture_learns_a_known_dictionary[relu-free",
    "test_sae_bank.py::test_every_architecture_learns_a_known_dictionary[topk-unit-auxk",
    "test_sae_cache.py::test_a_killed_writer_leaves_nothing_that_is_read_or_stays",
    "test_sae_cache.py::test_another_process_reads_while_one_writes",
    "test_sae_cache.py::test_any_orders_sites_and_dtypes_equal_the_stream",
    "test_sae_cache.py::test_two_writers_at_once_do_no_harm",
    "test_sae_train.py::test_training_for_an_objective_improves_it[kl",
    "test_store_verify.py::test_what_a_build_makes_of_a_small_model_holds[folded",
    "test_workers.py::test_a_silent_step_stops_within_seconds",
    "test_workers.py::test_a_worker_that_ends_hands_its_step_back_at_once",
    "test_workers_build.py::test_through_redis_as_in_process_though_a_worker_is_killed_in_training",
    "test_workers_deployment.py::test_the_service_of_the_compose_file_builds_a_release",
    "test_workers_faults.py",
    "test_workers_lake.py",
)
"""Tests that take many seconds and have shorter ones beside them; ``make test-all`` runs them, too."""


def pytest_xdist_auto_num_workers():
    """One process more than processors: tests of servers and browsers often wait."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(config, items):
    """Leave the long tests out unless they are asked for: by ``ATLAS_TEST_ALL``, or a file by its name."""
    named = any(".py" in argument for argument in config.args)
    if named or os.environ.get("ATLAS_TEST_ALL"):
        return
    left = [item for item in items if any(name in item.nodeid for name in LONG)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def _acting_as_oneself():
    """What one test says about who acts does not last."""
    yield
    access.use_source(access.os_user)


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    """No test ever reads or writes the user's own atlas."""
    for key in [k for k in os.environ if k.startswith("ATLAS_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path / "home"))
