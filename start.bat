@echo off
rem Sets up sagewan on the first call and opens it; arguments go to sagewan itself.
py -3 "%~dp0tools\start.py" %*
if not "%1"=="" exit /b %errorlevel%
pause
