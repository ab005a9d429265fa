"""The main job: stages of a run, lightning's module and callbacks, schedules."""
