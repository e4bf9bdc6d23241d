"""Who does what, where, in what order: router, gateway, controller and the worker around a stage, as Ray actors."""
