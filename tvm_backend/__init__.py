"""IntegerProgram to native code through Apache TVM, bit for bit equal to the reference interpreter.

Importing this package loads neither TVM nor torch; each verb stands in its own module: ``build.build``,
``bundle.save_bundle``, ``runtime.load``.
"""
